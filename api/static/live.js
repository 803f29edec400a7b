// Follows a running search: moves the progress as events arrive, and brings in points as they are measured.
(() => {
  "use strict";

  const article = document.getElementById("search");
  if (!article || article.dataset.live !== "true") return;

  const bar = document.getElementById("bar"), text = document.getElementById("progress-text");
  const source = new EventSource(`/v1/searches/${article.dataset.search}/events?after=${article.dataset.after}`);
  const REFRESH_MS = 3000;
  let refreshing = null, about = text.dataset.about;

  function stage(name) {
    const items = [...document.querySelectorAll("#stages li")];
    const at = items.findIndex((item) => item.dataset.stage === name);
    items.forEach((item, index) => {
      item.className = index < at ? "stage-done" : index === at ? "stage-now" : "";
      item.toggleAttribute("aria-current", index === at);
      if (index === at) item.setAttribute("aria-current", "step");
    });
  }

  function progress({ stage: name, done = 0, total = 0 }) {
    stage(name);
    bar.max = total || 1;
    bar.value = done;
    const words = [about, total && `${done} of ${total}`].filter(Boolean).join(", ");
    text.textContent = words ? `${name}: ${words}` : name;
  }

  async function refresh() {
    const response = await fetch(location.href, { headers: { Accept: "text/html" } });
    if (!response.ok) return;
    const fresh = new DOMParser().parseFromString(await response.text(), "text/html");
    document.getElementById("results").replaceWith(fresh.getElementById("results"));
    window.bitfrontierChart();
    window.bitfrontierSensitivities();
  }

  function refreshSoon() {
    refreshing ??= setTimeout(async () => { await refresh(); refreshing = null; }, REFRESH_MS);
  }

  source.addEventListener("stage", (event) => {
    const data = JSON.parse(event.data);
    about = data.about;
    progress(data);
    refreshSoon();
  });
  source.addEventListener("progress", (event) => progress(JSON.parse(event.data)));
  source.addEventListener("measured", refreshSoon);
  source.addEventListener("notice", refreshSoon);
  source.addEventListener("state", (event) => {
    const { state } = JSON.parse(event.data);
    if (["succeeded", "failed", "cancelled"].includes(state)) {
      source.close();
      location.reload();
    } else {
      const badge = document.querySelector(".facts .state");
      badge.textContent = state;
      badge.className = `state state-${state}`;
    }
  });
})();
