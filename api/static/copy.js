// Copies a command, or a file of the service, to the clipboard.
(() => {
  "use strict";

  const SHOWN_MS = 2000;

  // Browsers keep the clipboard from pages of other machines that come without TLS; an old way is left for those.
  async function write(text) {
    if (navigator.clipboard) return navigator.clipboard.writeText(text);
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    if (!done) throw new Error("the browser refused");
  }

  async function textOf({ copy, copyFile }) {
    if (copy) return document.getElementById(copy).textContent;
    const answer = await fetch(copyFile);
    if (!answer.ok) throw new Error(`the service answered ${answer.status}`);
    return answer.text();
  }

  async function copy(button) {
    if (button.getAttribute("aria-busy") === "true") return;
    const word = button.firstChild, before = word.textContent;
    button.setAttribute("aria-busy", "true");
    let told = "Copied";
    try {
      await write(await textOf(button.dataset));
    } catch (error) {
      told = "Not copied";
    }
    button.classList.toggle("done", told === "Copied");
    word.textContent = told;
    document.getElementById("copied").textContent = told;
    setTimeout(() => {
      word.textContent = before;
      button.removeAttribute("aria-busy");
      button.classList.remove("done");
    }, SHOWN_MS);
  }

  const show = () => document.querySelectorAll("[data-copy], [data-copy-file]").forEach((button) => { button.hidden = false; });

  show();
  document.addEventListener("htmx:after:swap", show);
  document.addEventListener("click", ({ target }) => {
    const button = target.closest("[data-copy], [data-copy-file]");
    if (button) copy(button);
  });
})();
