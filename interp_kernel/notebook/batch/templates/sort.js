// A click on a heading sorts by its column, a second one the other way round.
for (const button of document.querySelectorAll("#runs th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, body = document.querySelector("#runs tbody");
    const column = [...head.parentElement.children].indexOf(head);
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.children[column].dataset.v ?? row.children[column].textContent.trim();
    const rows = [...body.rows].map(row => [key(row), row]);
    rows.sort(([a], [b]) => {
      const x = a === "" ? NaN : Number(a), y = b === "" ? NaN : Number(b);
      const order = isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) || a.localeCompare(b) : x - y;
      return down ? -order : order;
    });
    body.append(...rows.map(([, row]) => row));
  });
}
