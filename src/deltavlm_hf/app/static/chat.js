// The conversation: questions, answers and what they mean. Its value is all of it. Which answer lies over the images is
// told to the viewer as an event.
const find = (selector) => element.querySelector(selector);
const list = find("ol"), log = find(".log"), dialog = find("dialog");
let told = {}, shown = -1, way = "Python";

function make(tag, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
}

function show() {
  const before = (told.turns || []).length;
  told = props.value || {};
  const turns = told.turns || [];
  if (turns.length !== before) shown = turns.length - 1; // the newest, unless another one is chosen later
  const busy = turns.some((turn) => !turn.done);
  document.body.classList.toggle("deltavlm-busy", busy);
  log.setAttribute("aria-busy", busy);
  find(".welcome").hidden = turns.length > 0;
  list.replaceChildren(...turns.map(makeTurn));
  log.scrollTop = log.scrollHeight;
  find(".take").hidden = !told.about || !told.about.before;
  for (const button of element.querySelectorAll(".answers, .picture")) button.disabled = !turns.some((turn) => turn.done);
  tellViewer();
}

function makeTurn(turn, number) {
  const answer = make("div", { className: "answer" }, make("p", { className: "words", textContent: turn.answer || "…" }));
  if (turn.meaning) answer.append(make("p", { className: "meaning", textContent: turn.meaning }));
  if (turn.note && turn.done) answer.append(make("p", { className: "note", textContent: turn.note }));
  if (turn.done && (turn.cells || turn.attention)) {
    const button = make("button", { type: "button", className: "look", textContent: "On the image" });
    button.setAttribute("aria-pressed", number === shown);
    button.setAttribute("aria-label", `Show answer ${number + 1} on the image`);
    button.onclick = () => {
      shown = number;
      [...list.children].forEach((item, at) => {
        const other = item.querySelector(".look");
        if (other) other.setAttribute("aria-pressed", at === shown);
      });
      tellViewer();
    };
    answer.append(button);
  }
  return make("li", {}, make("p", { className: "question", textContent: turn.asked, title: turn.question }), answer);
}

function tellViewer() {
  document.dispatchEvent(new CustomEvent("deltavlm:turn", { detail: (told.turns || [])[shown] || null }));
}

function save({ blob, name }) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
document.addEventListener("deltavlm:save", (event) => save(event.detail));

find(".answers").onclick = () => {
  const turns = told.turns.filter((turn) => turn.done).map(({ question, answer, meaning, note, cells, across, box }) => ({
    question, answer, meaning, note: note || undefined,
    cells: cells && Object.fromEntries(cells.map((each) => [each.kind, each.cells])),
    across: cells && across, box: cells && box,
  }));
  const text = JSON.stringify({ ...told.about, turns }, null, 2);
  save({ blob: new Blob([text], { type: "application/json" }), name: "deltavlm.json" });
};

find(".picture").onclick = () => {
  const turn = told.turns[shown];
  const lines = turn ? [`Q: ${turn.asked}`, `A: ${turn.answer}`, turn.meaning, turn.note].filter(Boolean) : [];
  document.dispatchEvent(new CustomEvent("deltavlm:picture", { detail: lines }));
};

function showCode() {
  find(".tabs").replaceChildren(...Object.keys(told.snippets).map((name) => {
    const tab = make("button", { type: "button", textContent: name });
    tab.setAttribute("aria-pressed", name === way);
    tab.onclick = () => { way = name; showCode(); find('.tabs [aria-pressed="true"]').focus(); };
    return tab;
  }));
  find("pre").textContent = told.snippets[way].replace("ADDRESS", location.origin + location.pathname);
  find(".copy").textContent = "Copy";
}
find(".program").onclick = () => { showCode(); dialog.showModal(); };
find(".close").onclick = () => dialog.close();
find(".copy").onclick = async () => {
  await navigator.clipboard.writeText(find("pre").textContent);
  find(".copy").textContent = "Copied";
};

watch("value", show);
show();
