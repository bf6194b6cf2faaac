"""What `generate` does otherwise for DeltaVLM than for other models that see images."""

import math

import torch
from transformers import GenerationMixin, LogitsProcessor, RepetitionPenaltyLogitsProcessor
from transformers.utils import torch_compilable_check

from .cache_name import CACHE, named_by_transformers


class _RefuseInvalidScores(LogitsProcessor):
    """Greedy search would take NaN for the best score and answer all the same."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        torch_compilable_check(
            scores.max() < math.inf,  # false for NaN, which `max` passes on
            "The language model's scores are NaN or infinite. Either weights are (a damaged file, a training run that "
            "diverged), or the pixels, or numbers left the range of float16: then try dtype=torch.bfloat16.",
        )
        return scores


class DeltaVLMGenerationMixin(GenerationMixin):
    """
    `pair_features`, a repetition penalty that counts the answer alone, no scores that are NaN or infinite; and the
    prompt as another program's language model is to read it.
    """

    def embed_prompt(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None, **images
    ) -> torch.Tensor:
        """
        What the language model reads: the prompt's embeddings, with the change tokens in place of the placeholders.
        `embed_prompt(**inputs)` takes what the processor returned.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`): Q placeholders, then the prompt.
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*): not used: padding is embedded like the rest.
            images: the pairs and their instructions, see [`~DeltaVLMModel.get_image_features`].

        Returns:
            `torch.Tensor` of shape `(B, L, d_llm)`: for `inputs_embeds`.

        Raises:
            ValueError: if placeholders and change tokens differ in number, or inputs contradict each other.
        """
        features = self.get_image_features(**images, return_dict=True)
        return self._merge_change_tokens(input_ids, self._embed(input_ids), features.pooler_output)

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict) -> dict:
        # Stock `generate` encodes when pixels are among the arguments, and drops every other argument of
        # `get_image_features`: `pair_features` alone would vanish. Beam search expands the outputs in place: a
        # caller's own are copied.
        if model_kwargs.get("pair_features") is not None:
            model_kwargs.setdefault("pixel_values", None)
        if model_kwargs.get("mm_encoder_outputs") is not None:
            outputs = model_kwargs["mm_encoder_outputs"]
            model_kwargs["mm_encoder_outputs"] = {key: type(value)(**value) for key, value in outputs.items()}
        return super()._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)

    @named_by_transformers
    def prepare_inputs_for_generation(
        self, input_ids, cache=None, inputs_embeds=None, is_first_iteration=False, **kwargs
    ):
        # An assistant's prefill does not count as a first iteration, but it needs the images as well.
        is_prefill = cache is not None and cache.get_seq_length() == 0
        return super().prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration or is_prefill,
            **{CACHE: cache},
            **kwargs,
        )

    def _get_logits_processor(
        self, generation_config, input_ids_seq_length=None, encoder_input_ids=None, logits_processor=None, **kwargs
    ):
        if encoder_input_ids is not None and encoder_input_ids.ndim == 2:  # scores have no entry for a placeholder
            placeholders = encoder_input_ids == self.config.image_token_id
            encoder_input_ids = torch.where(placeholders, encoder_input_ids[:, -1:], encoder_input_ids)
        processors = super()._get_logits_processor(
            generation_config,
            input_ids_seq_length,
            encoder_input_ids,
            logits_processor=logits_processor,
            **kwargs,
        )
        for processor in processors:
            if isinstance(processor, RepetitionPenaltyLogitsProcessor) and processor not in (logits_processor or []):
                processor.prompt_ignore_length = input_ids_seq_length
        if not generation_config.remove_invalid_values:
            processors.insert(0, _RefuseInvalidScores())
        return processors
