"""What only the browser can do for the playground: a key, the clipboard, and a waiting click.

The code below runs in the page. It holds no text of a model: what is copied comes as a value.
"""

import anywidget
import traitlets

BOX, MAIN = "lmlib-playground", "lmlib-generate"  # CSS classes: the playground, its first button
PATIENCE = 600  # ms until a click that Python has not answered is said to wait

SCRIPT = """
function render({ model, el }) {
  const page = new AbortController(), options = { capture: true, signal: page.signal };
  const isInside = target => el.closest(".BOX")?.contains(target);
  const copy = document.createElement("button"), line = document.createElement("span");
  copy.className = "jupyter-widgets jupyter-button widget-button";
  copy.style.width = "auto";
  copy.title = "copy the prompt and its continuation";
  line.setAttribute("role", "alert");
  el.append(copy, line);

  const showCopy = label => { copy.textContent = label; copy.disabled = !model.get("text") };
  const onText = () => showCopy("Copy");
  copy.onclick = async () => {
    try {
      await navigator.clipboard.writeText(model.get("text"));
    } catch {  // a page without HTTPS has no clipboard, but it has this command
      const area = document.createElement("textarea");
      area.value = model.get("text");
      el.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    showCopy("Copied");
    setTimeout(onText, 1500);
  };

  // Python answers each message; one that it cannot answer yet waits for the kernel.
  let timer = null, asked = null;
  const ask = (button, message) => {
    clearTimeout(timer);
    asked?.removeAttribute("aria-busy");
    asked = button;
    timer = setTimeout(() => {
      asked?.setAttribute("aria-busy", "true");
      line.textContent = "The kernel is busy with another cell. This click waits for it.";
    }, PATIENCE);
    model.send(message);
  };
  const onAnswer = () => {
    clearTimeout(timer);
    asked?.removeAttribute("aria-busy");
    line.textContent = "";
  };
  window.addEventListener("click", event => {
    const button = event.target.closest?.("button");
    if (button && button !== copy && isInside(button)) ask(button, {});
  }, options);
  window.addEventListener("keydown", event => {  // before JupyterLab, which would run the cell
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || !isInside(event.target)
        || !event.target.matches("textarea")) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    ask(el.closest(".BOX").querySelector("button.MAIN"), { prompt: event.target.value });
  }, options);

  onText();
  model.on("change:text", onText);
  model.on("msg:custom", onAnswer);
  return () => {
    page.abort();
    clearTimeout(timer);
    model.off("change:text", onText);
    model.off("msg:custom", onAnswer);
  };
}
export default { render };
"""

STYLE = """
.BOX button[aria-busy="true"]::after { content: " (waiting)" }
.BOX [role="alert"] { color: #D55E00; margin-left: .6em; font-size: 13px; line-height: 28px }
.BOX :is(button, input, textarea, select, [tabindex]):focus-visible {
  outline: 2px solid var(--jp-brand-color1, #1976d2); outline-offset: 1px }
.BOX textarea { font-family: var(--jp-code-font-family, monospace); font-size: 14px }
"""


def _named(code: str) -> str:
    return code.replace("BOX", BOX).replace("MAIN", MAIN).replace("PATIENCE", str(PATIENCE))


class Keys(anywidget.AnyWidget):
    """A Copy button; Ctrl+Enter in a text area of the playground calls `on_enter(prompt)`."""

    _esm, _css = _named(SCRIPT), _named(STYLE)
    text = traitlets.Unicode().tag(sync=True)  # what the button copies

    def __init__(self, on_enter, **options):
        super().__init__(**options)
        self.on_enter = on_enter
        self.on_msg(self._answer)

    def _answer(self, _, message: dict, buffers: list):
        self.send({})
        if isinstance(prompt := message.get("prompt"), str):
            self.on_enter(prompt)
