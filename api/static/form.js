// Fills in a registered model at a click; htmx asks for what then changes.
(() => {
  "use strict";

  for (const button of document.querySelectorAll("[data-fill]")) {
    button.closest("[hidden]")?.removeAttribute("hidden");
    button.addEventListener("click", () => {
      const input = document.getElementById(button.dataset.fill);
      input.value = button.textContent;
      input.dispatchEvent(new Event("input", { bubbles: true }));
      input.focus();
    });
  }
})();
