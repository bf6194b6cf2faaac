"""The model through its public interface: forward, generate, save and load, training."""

import copy

import pytest
import torch
from generating import answer_ids
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BloomConfig,
    GPT2Config,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TextStreamer,
    Trainer,
    TrainingArguments,
)

from deltavlm_hf import DeltaVLMConfig, DeltaVLMForConditionalGeneration, DeltaVLMModel


def without(inputs: dict, *names: str) -> dict:
    return {name: value for name, value in inputs.items() if name not in names}


class TestConfig:
    def test_defaults_are_the_papers(self):
        config = DeltaVLMConfig()
        assert (config.vision_config.hidden_size, config.vision_config.num_hidden_layers) == (1408, 39)
        assert (config.qformer_config.num_hidden_layers, config.qformer_config.vocab_size) == (12, 30523)
        assert (config.text_config.model_type, config.text_config.hidden_size) == ("llama", 4096)
        assert config.num_query_tokens == 32

    def test_round_trip(self, tmp_path, small_config):
        config = small_config(difference_module="concat", spatial_position_codes=True)
        config.save_pretrained(tmp_path)
        loaded = DeltaVLMConfig.from_pretrained(tmp_path)
        assert loaded.difference_module == "concat" and loaded.spatial_position_codes
        assert loaded.vision_config.to_dict() == config.vision_config.to_dict()
        assert loaded.text_config.to_dict() == config.text_config.to_dict()

    def test_unknown_difference_module(self):
        with pytest.raises(ValueError, match="'minus', expected one of csrm, difference, concat"):
            DeltaVLMConfig(difference_module="minus")

    def test_width_that_does_not_suit_spatial_codes(self):
        with pytest.raises(ValueError, match="multiple of 4, got 30"):
            DeltaVLMConfig(vision_config={"hidden_size": 30}, spatial_position_codes=True)

    @pytest.mark.parametrize("vocabulary", [30522, 30523])
    def test_qformer_vocabulary_survives_saving(self, vocabulary, tmp_path):
        DeltaVLMConfig(qformer_config={"vocab_size": vocabulary}).save_pretrained(tmp_path)
        assert DeltaVLMConfig.from_pretrained(tmp_path).qformer_config.vocab_size == vocabulary


class TestForward:
    @torch.inference_mode()
    def test_shapes(self, small_model, small_inputs):
        outputs = small_model(**small_inputs)
        assert outputs.logits.shape == (2, 9, 61)
        assert outputs.image_hidden_states.shape == (2, 4, 32)
        assert small_model.encode_pair(small_inputs["pixel_values"]).shape == (2, 2 * 17, 32)

    @torch.inference_mode()
    def test_batch_equals_singles(self, model, processor, pairs):
        questions = ["What changed?", "Please judge whether these two images have changed. Please answer yes or no."]
        batch = model(**processor(images=pairs, text=questions, padding=True, return_tensors="pt"))
        for row, (pair, question) in enumerate(zip(pairs, questions, strict=True)):
            single = model(**processor(images=pair, text=question, return_tensors="pt"))
            length = single.logits.shape[1]
            torch.testing.assert_close(batch.logits[row, -length:], single.logits[0], atol=1e-4, rtol=0)

    @torch.inference_mode()
    @pytest.mark.parametrize("text_config", [None, GPT2Config, BloomConfig], ids=["llama", "gpt2", "bloom"])
    def test_padding_side_does_not_matter(self, text_config, small_config, small_inputs):
        torch.manual_seed(0)
        sizes = {"vocab_size": 61, "hidden_size": 32, "n_layer": 2, "n_head": 4}
        config = small_config() if text_config is None else small_config(text_config=text_config(**sizes))
        model = DeltaVLMForConditionalGeneration(config).eval()
        left = model(**small_inputs).logits
        input_ids = small_inputs["input_ids"].clone()
        input_ids[0] = input_ids[0].roll(-2)
        right = model(**{**small_inputs, "input_ids": input_ids, "attention_mask": (input_ids != 60).long()}).logits
        torch.testing.assert_close(left[0, 2:], right[0, :-2], atol=1e-5, rtol=0)

    @torch.inference_mode()
    def test_padding_side_of_the_instruction_does_not_matter(self, small_model, small_inputs):
        right = small_model(**small_inputs).logits
        left = {name: small_inputs[name].clone() for name in ("qformer_input_ids", "qformer_attention_mask")}
        for tensor in left.values():
            tensor[0] = tensor[0].roll(1)
        left = small_model(**{**small_inputs, **left}).logits
        read = small_inputs["attention_mask"].bool()
        torch.testing.assert_close(left[read], right[read], atol=1e-5, rtol=0)

    @torch.inference_mode()
    def test_swapped_dates_change_the_answer_features(self, model, processor, pairs):
        inputs = processor(images=pairs, text=["What changed?"] * 2, padding=True, return_tensors="pt")
        there = model(**inputs)
        inputs["pixel_values"] = inputs["pixel_values"].flip(1)
        back = model(**inputs)
        assert (there.image_hidden_states - back.image_hidden_states).abs().max() > 1e-3
        assert (there.logits - back.logits).abs().max() > 1e-3

    @torch.inference_mode()
    def test_cached_pair(self, small_model, small_inputs):
        pair_features = small_model.encode_pair(small_inputs["pixel_values"])
        cached = small_model(**without(small_inputs, "pixel_values"), pair_features=pair_features)
        assert cached.logits.equal(small_model(**small_inputs).logits)

    @torch.inference_mode()
    def test_one_pair_for_several_questions(self, small_model, small_inputs):
        one = {**small_inputs, "pixel_values": small_inputs["pixel_values"][:1]}
        two = {**small_inputs, "pixel_values": small_inputs["pixel_values"][:1].expand(2, -1, -1, -1, -1)}
        torch.testing.assert_close(small_model(**one).logits, small_model(**two).logits)

    @torch.inference_mode()
    def test_other_image_size(self, small_model, small_inputs):
        larger = torch.randn(2, 2, 3, 48, 48)
        outputs = small_model(**{**small_inputs, "pixel_values": larger}, interpolate_pos_encoding=True)
        assert outputs.logits.isfinite().all()

    @torch.inference_mode()
    def test_inputs_embeds(self, small_model, small_inputs):
        expected = small_model(**small_inputs, output_hidden_states=True)
        embeds = expected.hidden_states[0]
        actual = small_model(inputs_embeds=embeds, attention_mask=small_inputs["attention_mask"])
        torch.testing.assert_close(actual.logits, expected.logits)

    def test_attentions_on_request(self, small_config, small_inputs):
        model = DeltaVLMForConditionalGeneration._from_config(small_config(), attn_implementation="eager").eval()
        outputs = model(**small_inputs, output_attentions=True)
        assert outputs.qformer_outputs.cross_attentions[0].shape == (2, 4, 4, 34)  # pairs, heads, queries, pair tokens
        assert len(outputs.vision_outputs.attentions) == 2
        assert outputs.attentions[0].shape == (2, 4, 9, 9)

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_attention_implementation_reaches_all_parts(self, implementation, converted):
        model = AutoModelForImageTextToText.from_pretrained(converted, attn_implementation=implementation)
        for part in (model.vision_model, model.qformer, model.language_model):
            assert part.config._attn_implementation == implementation

    @torch.inference_mode()
    def test_attention_implementations_agree(self, converted, processor, pairs):
        inputs = processor(images=pairs, text=["What?", "How many roads?"], padding=True, return_tensors="pt")
        eager, sdpa = (
            AutoModelForImageTextToText.from_pretrained(converted, attn_implementation=name)(**inputs).logits
            for name in ("eager", "sdpa")
        )
        read = inputs["attention_mask"].bool()
        torch.testing.assert_close(eager[read], sdpa[read], atol=1e-4, rtol=0)

    @torch.inference_mode()
    def test_bfloat16(self, converted, processor, pairs):
        model = AutoModelForImageTextToText.from_pretrained(converted, dtype=torch.bfloat16)
        inputs = processor(images=pairs[0], text="What changed?", return_tensors="pt").to(torch.bfloat16)
        outputs = model(**inputs)
        assert outputs.logits.dtype == torch.bfloat16 and outputs.logits.isfinite().all()
        assert model.generate(**inputs, max_new_tokens=3).shape == (1, inputs["input_ids"].shape[1] + 3)


class TestErrors:
    @pytest.mark.parametrize("call", ["forward", "generate"])
    def test_placeholder_count(self, call, small_model, small_inputs):
        input_ids = small_inputs["input_ids"].clone()
        input_ids[0, 5] = 7  # one placeholder less
        with pytest.raises(ValueError, match=r"\[3, 4\] placeholders .* give 4 change tokens"):
            getattr(small_model, call)(**{**small_inputs, "input_ids": input_ids})

    def test_placeholders_in_the_wrong_row(self, small_model, small_inputs):
        input_ids = small_inputs["input_ids"].clone()
        input_ids[0, 5], input_ids[1, 5] = 7, 61
        with pytest.raises(ValueError, match=r"\[3, 5\] placeholders"):
            small_model(**{**small_inputs, "input_ids": input_ids})

    @pytest.mark.parametrize("call", ["forward", "generate"])
    def test_placeholders_without_images(self, call, small_model, small_inputs):
        with pytest.raises(ValueError, match="8 image placeholders, but there are 0 images"):
            getattr(small_model, call)(**without(small_inputs, "pixel_values", "qformer_input_ids"))

    def test_single_images(self, small_model, small_inputs):
        with pytest.raises(ValueError, match=r"\(batch, 2, 3, height, width\).*got \(2, 3, 32, 32\)"):
            small_model(**{**small_inputs, "pixel_values": small_inputs["pixel_values"][:, 0]})

    def test_missing_instruction(self, small_model, small_inputs):
        with pytest.raises(ValueError, match="`qformer_input_ids` is missing"):
            small_model(**without(small_inputs, "qformer_input_ids"))

    def test_images_given_twice(self, small_model, small_inputs):
        pair_features = small_model.encode_pair(small_inputs["pixel_values"])
        with pytest.raises(ValueError, match="one of them, got pixel_values and pair_features"):
            small_model(**small_inputs, pair_features=pair_features)

    def test_foreign_pair_features(self, small_model, small_inputs):
        with pytest.raises(ValueError, match=r"\(batch, 34, 32\).*got \(2, 34, 16\)"):
            small_model(**without(small_inputs, "pixel_values"), pair_features=torch.zeros(2, 34, 16))

    def test_pair_features_of_another_size(self, small_model, small_inputs):
        larger = small_model.encode_pair(torch.randn(2, 2, 3, 48, 48), interpolate_pos_encoding=True)
        text = without(small_inputs, "pixel_values")
        with pytest.raises(ValueError, match="hold 74 tokens.*give 34.*interpolate_pos_encoding=True"):
            small_model(**text, pair_features=larger)
        assert small_model(**text, pair_features=larger, interpolate_pos_encoding=True).logits.isfinite().all()

    def test_pair_features_of_another_precision(self, small_model, small_inputs):
        pair_features = small_model.encode_pair(small_inputs["pixel_values"])
        text = without(small_inputs, "pixel_values")
        with pytest.raises(ValueError, match="torch.bfloat16.*computes in torch.float32"):
            small_model(**text, pair_features=pair_features.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            small_model(**text, pair_features=small_model.encode_pair(small_inputs["pixel_values"]))
        small_model.bfloat16()
        with pytest.raises(ValueError, match="torch.float32.*computes in torch.bfloat16"):
            small_model(**text, pair_features=pair_features)

    def test_number_of_pairs(self, small_model, small_inputs):
        with pytest.raises(ValueError, match="3 image pairs for 2 instructions"):
            small_model(**without(small_inputs, "pixel_values"), pair_features=torch.zeros(3, 34, 32))

    @pytest.mark.parametrize("images", ["pixel_values", "pair_features"])
    def test_embeddings_beside_images(self, images, small_model, small_inputs):
        """With as many embeddings as there are ids or not, nothing is left out in silence."""
        given = {name: value for name, value in small_inputs.items() if name != "input_ids"}
        if images == "pair_features":
            given[images] = small_model.encode_pair(given.pop("pixel_values")).detach()
        for call in (small_model, small_model.generate):
            with pytest.raises(ValueError, match="must hold the change tokens already: give no images beside them"):
                call(inputs_embeds=torch.zeros(2, 9, 32), **given)

    def test_prompt_given_twice(self, small_model, small_inputs):
        with pytest.raises(ValueError, match="`input_ids` or as `inputs_embeds`"):
            small_model(**small_inputs, inputs_embeds=torch.zeros(2, 9, 32))


class TestGenerate:
    @pytest.mark.parametrize(
        "kwargs",
        [
            {},
            {"num_beams": 3},
            {"num_beams": 3, "num_return_sequences": 2},
            {"repetition_penalty": 1.5},
            {"cache_implementation": "static"},
            {"use_cache": False},
        ],
        ids=str,
    )
    def test_batch_equals_singles(self, kwargs, small_model, small_inputs):
        batch = answer_ids(small_model, small_inputs, **kwargs)
        per_row = len(batch) // 2
        for row in range(2):
            rows = {name: value[row : row + 1] for name, value in small_inputs.items()}
            single = answer_ids(small_model, rows, **kwargs)
            padded = [ids + [60] * (len(batch[0]) - len(ids)) for ids in single]  # where the other row goes on longer
            assert padded == batch[row * per_row : (row + 1) * per_row]

    def test_sampling_is_seeded(self, small_model, small_inputs):
        samples = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            samples.append(answer_ids(small_model, small_inputs, do_sample=True, num_return_sequences=2))
        assert samples[0] == samples[1] != samples[2]
        assert len(samples[0]) == 4

    @pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"repetition_penalty": 1.5}], ids=str)
    def test_from_embeddings(self, kwargs, small_model, small_inputs):
        with torch.inference_mode():
            embeds = small_model(**small_inputs, output_hidden_states=True).hidden_states[0]
        prompt = {"inputs_embeds": embeds, "attention_mask": small_inputs["attention_mask"]}
        ids = small_model.generate(**prompt, max_new_tokens=8, **kwargs)
        assert ids.tolist() == answer_ids(small_model, small_inputs, max_new_tokens=8, **kwargs)

    def test_assisted(self, small_model, small_inputs):
        row = {name: value[1:] for name, value in small_inputs.items()}
        assert answer_ids(small_model, row, prompt_lookup_num_tokens=2) == answer_ids(small_model, row)

    def test_assisted_by_another_model(self, small_model, small_config, small_inputs):
        torch.manual_seed(1)
        assistant = DeltaVLMForConditionalGeneration(small_config()).eval()
        row = {name: value[1:] for name, value in small_inputs.items()}
        assert answer_ids(small_model, row, assistant_model=assistant) == answer_ids(small_model, row)

    @pytest.mark.parametrize(
        "kwargs", [{"encoder_repetition_penalty": 1.2}, {"encoder_no_repeat_ngram_size": 2}], ids=str
    )
    def test_options_that_read_the_prompt(self, kwargs, small_model, small_inputs):
        """The placeholder has no score, so it must not be looked up."""
        assert small_model.config.image_token_id >= small_model.config.text_config.vocab_size
        assert len(answer_ids(small_model, small_inputs, **kwargs)) == 2

    def test_streamer(self, model, processor, pairs, capsys):
        inputs = processor(images=pairs[0], text="What changed?", return_tensors="pt")
        streamer = TextStreamer(processor.tokenizer, skip_prompt=True)
        ids = model.generate(**inputs, num_beams=1, max_new_tokens=5, streamer=streamer)
        answer = processor.decode(ids[0, inputs["input_ids"].shape[1] :])
        assert capsys.readouterr().out.strip() == answer.strip() != ""

    @pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}], ids=str)
    def test_cached_pair(self, kwargs, model, processor, pairs):
        kwargs = {"num_beams": 1, **kwargs}
        inputs = processor(images=pairs, text=["What changed?", "Where?"], padding=True, return_tensors="pt")
        expected = answer_ids(model, inputs, **kwargs)
        pair_features = model.encode_pair(inputs.pop("pixel_values"))
        before = pair_features.clone()
        for _ in range(2):  # a search must not spoil the cache
            assert answer_ids(model, inputs, pair_features=pair_features, **kwargs) == expected
        assert pair_features.equal(before)

    def test_encoder_outputs_survive_beam_search(self, small_model, small_inputs):
        images = {name: small_inputs[name] for name in ("pixel_values", "qformer_input_ids", "qformer_attention_mask")}
        outputs = {"image": small_model.get_image_features(**images)}
        text = without(small_inputs, *images)
        expected = answer_ids(small_model, small_inputs, num_beams=3)
        for _ in range(2):
            assert answer_ids(small_model, text, mm_encoder_outputs=outputs, num_beams=3) == expected

    def test_images_are_encoded_once(self, small_model, small_inputs):
        calls = []
        hook = small_model.vision_model.register_forward_hook(lambda *call: calls.append(call))
        answer_ids(small_model, small_inputs, num_beams=3, use_cache=False)
        hook.remove()
        assert len(calls) == 1

    def test_repetition_penalty_spares_the_prompt(self, small_model, small_inputs):
        inputs = {name: value[1:] for name, value in small_inputs.items()}
        inputs["input_ids"] = inputs["input_ids"].clone()
        for _ in range(20):  # until the answer stands in the prompt, where a stock penalty would suppress it
            plain = answer_ids(small_model, inputs, max_new_tokens=1)
            if plain[0][0] in inputs["input_ids"]:
                break
            inputs["input_ids"][0, -2] = plain[0][0]
        assert plain[0][0] in inputs["input_ids"]
        assert answer_ids(small_model, inputs, max_new_tokens=1, repetition_penalty=9.0) == plain

    def test_repetition_penalty_of_the_caller_is_left_alone(self, small_model, small_inputs):
        mine = RepetitionPenaltyLogitsProcessor(1.3, prompt_ignore_length=2)
        small_model.generate(**small_inputs, max_new_tokens=2, logits_processor=LogitsProcessorList([mine]))
        assert mine.prompt_ignore_length == 2


class TestSaving:
    @torch.inference_mode()
    def test_round_trip(self, tmp_path, small_model, small_inputs):
        small_model.save_pretrained(tmp_path)
        assert (tmp_path / "model.safetensors").exists()
        loaded, info = DeltaVLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert loaded(**small_inputs).logits.equal(small_model(**small_inputs).logits)

    @torch.inference_mode()
    def test_tied_language_model(self, tmp_path, small_config, small_inputs):
        text_config = GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4)
        model = DeltaVLMForConditionalGeneration(small_config(text_config=text_config)).eval()
        model.save_pretrained(tmp_path)
        loaded = DeltaVLMForConditionalGeneration.from_pretrained(tmp_path)
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        assert loaded(**small_inputs).logits.equal(model(**small_inputs).logits)

    def test_base_model_leaves_the_language_model_on_disk(self, tmp_path, small_model):
        small_model.save_pretrained(tmp_path)
        base, info = DeltaVLMModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert not any("language_model" in name for name, _ in base.named_parameters())

    def test_device_map_with_offload(self, tmp_path, small_model, small_inputs):
        small_model.save_pretrained(tmp_path / "model")
        parts = ("vision_model", "difference", "query_tokens", "qformer", "language_projection", "language_model")
        devices = {part: "disk" if part in ("vision_model", "language_model") else "cpu" for part in parts}
        loaded = AutoModelForImageTextToText.from_pretrained(
            tmp_path / "model", device_map=devices, offload_folder=tmp_path / "offload"
        )
        assert loaded.language_model.lm_head.weight.device.type == "meta"
        assert answer_ids(loaded, small_inputs) == answer_ids(small_model, small_inputs)

    @pytest.mark.parametrize("spatial", [False, True])
    def test_deepcopy(self, spatial, small_config, small_inputs):
        model = DeltaVLMForConditionalGeneration(small_config(spatial_position_codes=spatial)).eval()
        assert answer_ids(copy.deepcopy(model), small_inputs) == answer_ids(model, small_inputs)


class TestTraining:
    def labels(self, inputs):
        return inputs["input_ids"].masked_fill(inputs["input_ids"] >= 60, -100)

    def test_initialisation_from_scratch(self, small_model):
        assert 0.01 < small_model.query_tokens.std() < 0.03
        assert 0.01 < small_model.vision_model.embeddings.position_embedding.std() < 0.03
        for name, parameter in small_model.named_parameters():
            if parameter.ndim > 1:
                assert parameter.std() > 1e-3, name

    def test_trainer(self, tmp_path, converted, processor, pairs):
        """The stock `Trainer`: the loss falls, the frozen language model stays, a checkpoint loads."""
        model = AutoModelForImageTextToText.from_pretrained(converted)
        model.language_model.requires_grad_(False)
        frozen = {name: tensor.clone() for name, tensor in model.language_model.state_dict().items()}
        query_tokens = model.query_tokens.detach().clone()

        def collate(rows):
            images, answers = zip(*rows, strict=True)
            texts = ["What changed?"] * len(rows)
            return processor(images=list(images), text=texts, answers=list(answers), padding=True, return_tensors="pt")

        arguments = TrainingArguments(
            tmp_path,
            max_steps=8,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            remove_unused_columns=False,
            save_steps=8,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
        )
        rows = [(pairs[0], "a new road"), (pairs[1], "nothing has changed")]
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate, processing_class=processor)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < 0.8 * losses[0]
        assert trainer.predict(rows).predictions.shape[-1] == model.config.text_config.vocab_size  # logits alone
        assert not model.query_tokens.equal(query_tokens)
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint-8")
        for name, tensor in loaded.language_model.state_dict().items():
            assert tensor.equal(frozen[name]), name
        assert loaded.query_tokens.equal(model.query_tokens)
        AutoProcessor.from_pretrained(tmp_path / "checkpoint-8")

    @pytest.mark.parametrize("kept", [5, torch.tensor([5, 6, 7])], ids=["last", "positions"])
    def test_loss_of_some_logits(self, kept, small_model, small_inputs):
        labels = small_inputs["input_ids"].masked_fill(torch.arange(9) < 6, -100)  # the last three, from the fifth on
        losses, gradients = [], []
        for logits_to_keep in (0, kept):
            small_model.zero_grad()
            outputs = small_model(**small_inputs, labels=labels, logits_to_keep=logits_to_keep)
            outputs.loss.backward()
            losses.append(outputs.loss.detach())
            gradients.append(small_model.query_tokens.grad.clone())
        assert outputs.logits.shape[1] == (kept if isinstance(kept, int) else len(kept))
        torch.testing.assert_close(losses[1], losses[0])
        torch.testing.assert_close(gradients[1], gradients[0])

    def test_every_parameter_gets_a_gradient(self, small_model, small_inputs):
        small_model.train()
        small_model(**small_inputs, labels=self.labels(small_inputs)).loss.backward()
        assert [name for name, parameter in small_model.named_parameters() if parameter.grad is None] == []

    def test_gradient_checkpointing_changes_nothing(self, small_config, small_inputs):
        gradients = []
        for checkpointing in (False, True):
            torch.manual_seed(0)
            config = small_config(difference_dropout=0.0)
            config.qformer_config.hidden_dropout_prob = config.qformer_config.attention_probs_dropout_prob = 0.0
            model = DeltaVLMForConditionalGeneration(config).train()
            if checkpointing:
                model.gradient_checkpointing_enable()
            calls = []
            model.vision_model.encoder.layers[0].layer_norm1.register_forward_hook(
                lambda *call, calls=calls: calls.append(call)
            )
            model(**small_inputs, labels=self.labels(small_inputs)).loss.backward()
            assert len(calls) == (2 if checkpointing else 1)  # recomputed on the way back
            gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
        torch.testing.assert_close(*gradients)

    def test_learns_to_tell_two_pairs_apart(self, small_config, small_inputs):
        torch.manual_seed(0)
        model = DeltaVLMForConditionalGeneration(small_config())
        input_ids = torch.tensor([[61, 61, 61, 61, 1, 9, 20], [61, 61, 61, 61, 1, 9, 30]])  # one question, two answers
        labels = input_ids.clone()
        labels[:, :-1] = -100
        inputs = {"pixel_values": small_inputs["pixel_values"], "qformer_input_ids": torch.tensor([[5], [5]])}
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(60):
            loss = model(input_ids=input_ids, labels=labels, **inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        answers = answer_ids(model.eval(), {"input_ids": input_ids[:, :-1], **inputs}, max_new_tokens=1)
        assert answers == [[20], [30]]
