"use strict";
(() => {
  const PAGE = 24; // cards shown at first, and added by "Show more"
  const cards = [...document.querySelectorAll(".card")];
  const find = (id) => document.getElementById(id);
  const form = find("filters"), count = find("count"), more = find("more").parentElement;
  const text = new Map(cards.map((card) => [card, card.textContent.toLowerCase()]));
  const chosen = (id) => (find(id) ? find(id).value : "");
  let most = PAGE;

  function matches(card) {
    const same = (id) => !chosen(id) || card.dataset[id] === chosen(id);
    const words = find("words").value.toLowerCase().split(/\s+/);
    return ["outcome", "shift", "part"].every(same) && words.every((w) => text.get(card).includes(w));
  }

  function show() {
    const found = cards.filter(matches);
    const kept = new Set(found.slice(0, most));
    for (const card of cards) card.hidden = !kept.has(card);
    const share = Math.round((100 * found.length) / cards.length);
    count.textContent = `${found.length} of ${cards.length} queries (${share} %)` +
      (kept.size < found.length ? `, the first ${kept.size} shown` : "");
    more.hidden = kept.size === found.length;
  }

  function restart() { most = PAGE; show(); }

  form.hidden = false;
  form.addEventListener("input", restart);
  form.addEventListener("submit", (event) => event.preventDefault());
  find("more").addEventListener("click", () => {
    const first = most;
    most += PAGE;
    show();
    const next = cards.filter((card) => !card.hidden)[first];
    if (next) { next.tabIndex = -1; next.focus(); }
  });
  find("every").addEventListener("click", () => { most = cards.length; show(); });

  // The name of a picture under the pointer.
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  tip.setAttribute("aria-hidden", "true");
  document.body.append(tip);
  find("cards").addEventListener("pointerover", (event) => {
    const picture = event.target.closest(".t");
    tip.hidden = !picture;
    if (!picture) return;
    tip.textContent = picture.getAttribute("aria-label");
    const box = picture.getBoundingClientRect();
    const left = Math.min(box.left + scrollX, scrollX + document.documentElement.clientWidth - tip.offsetWidth - 8);
    tip.style.left = `${Math.max(0, left)}px`;
    tip.style.top = `${box.bottom + scrollY + 4}px`;
  });
  find("cards").addEventListener("pointerleave", () => { tip.hidden = true; });
  show();
})();
