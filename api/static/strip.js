// Lets a person walk the layers of an allocation by arrow keys or the mouse, and names the one in hand.
(() => {
  "use strict";

  const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

  function layerOf(cell) {
    if (cell.dataset.layer) return cell.dataset.layer;
    const head = cell.closest("table").tHead.rows[0].cells[cell.cellIndex];
    return `${head.dataset.block}.${cell.parentElement.cells[0].textContent}`;
  }

  // The cells of a table or of a list as rows of cells; a block without such a layer leaves a hole.
  function rowsOf(place) {
    if (place.matches("ul")) return [[...place.children]];
    return [...place.tBodies[0].rows].map((row) => [...row.cells].map((cell) => (cell.matches(".cell") ? cell : null)));
  }

  function next(rows, [row, column], [down, right]) {
    do { row += down; column += right; } while (rows[row] && column in rows[row] && !rows[row][column]);
    return rows[row]?.[column];
  }

  function start(allocation) {
    const readout = allocation.querySelector(".readout");
    readout.hidden = false;
    readout.setAttribute("aria-hidden", "true");
    readout.textContent = "Point at a layer, or walk them with the arrow keys.";

    function tell(cell) {
      const name = document.createElement("strong");
      name.textContent = layerOf(cell);
      readout.replaceChildren(name, ` ${cell.title}`);
    }

    for (const place of allocation.querySelectorAll("table.grid, ul.strip")) {
      const rows = rowsOf(place), cells = rows.flat().filter(Boolean);
      if (place.matches("table")) place.setAttribute("role", "grid");
      cells.forEach((cell, index) => { cell.tabIndex = index ? -1 : 0; });
      place.addEventListener("keydown", (event) => {
        const step = STEPS[event.key], row = rows.findIndex((row) => row.includes(event.target));
        if (!step || row < 0) return;
        const target = next(rows, [row, rows[row].indexOf(event.target)], step);
        event.preventDefault();
        if (!target) return;
        event.target.tabIndex = -1;
        target.tabIndex = 0;
        target.focus();
      });
      for (const kind of ["focusin", "pointerover"])
        place.addEventListener(kind, (event) => { const cell = event.target.closest("td.cell, li"); if (cell) tell(cell); });
    }
  }

  function scan() {
    for (const allocation of document.querySelectorAll(".allocation:not([data-walked])")) {
      allocation.dataset.walked = "true";
      start(allocation);
    }
  }

  scan();
  document.addEventListener("htmx:after:swap", scan);
})();
