// A list of many images of which only the rows in sight exist.

import { percent } from "./words.js";

const ROW = 52; // pixels; the style sheet has it too
const SPARE = 6; // rows beyond those in sight

export class ImageList {
  // `pick(index)` is called when the user picks an image.
  constructor(box, catalogue, pick) {
    this._box = box;
    this._catalogue = catalogue;
    this._pick = pick;
    this._images = [];
    this._chosen = null;
    this._rows = box.appendChild(document.createElement("div"));
    box.addEventListener("scroll", () => this._draw());
    new ResizeObserver(() => this._draw()).observe(box);
    box.addEventListener("click", (event) => {
      const row = event.target.closest("[data-index]");
      if (row) pick(Number(row.dataset.index));
    });
  }

  get images() {
    return this._images;
  }

  show(images) {
    this._images = images;
    this._rows.style.height = `${images.length * ROW}px`;
    this._box.scrollTop = 0;
    this._reveal();
  }

  choose(index) {
    this._chosen = index;
    this._reveal();
  }

  // The image `steps` further on than the chosen one, null at either end.
  neighbour(steps) {
    const place = this._images.indexOf(this._chosen);
    return this._images[place < 0 ? 0 : place + steps] ?? null;
  }

  _reveal() {
    const place = this._images.indexOf(this._chosen);
    const { scrollTop, clientHeight } = this._box;
    if (place >= 0 && place * ROW < scrollTop) this._box.scrollTop = place * ROW;
    if (place >= 0 && (place + 1) * ROW > scrollTop + clientHeight) {
      this._box.scrollTop = (place + 1) * ROW - clientHeight;
    }
    this._draw();
  }

  _draw() {
    const first = Math.max(0, Math.floor(this._box.scrollTop / ROW) - SPARE);
    const last = Math.ceil((this._box.scrollTop + this._box.clientHeight) / ROW) + SPARE;
    const rows = this._images.slice(first, last).map((index, place) => this._row(index, first + place));
    this._rows.replaceChildren(...rows);
    const chosen = rows.find((row) => row.getAttribute("aria-selected") === "true");
    if (chosen) this._box.setAttribute("aria-activedescendant", chosen.id);
    else this._box.removeAttribute("aria-activedescendant");
  }

  _row(index, place) {
    const { ids, labels, predictions, errors } = this._catalogue;
    const row = document.createElement("div");
    row.id = `image-${index}`;
    row.dataset.index = index;
    row.className = "row";
    row.title = ids[index];
    row.style.top = `${place * ROW}px`;
    row.setAttribute("role", "option");
    row.setAttribute("aria-selected", index === this._chosen);
    row.setAttribute("aria-posinset", place + 1);
    row.setAttribute("aria-setsize", this._images.length);
    const isWrong = this._catalogue.isWrong(index);
    const add = (className, text) => {
      const part = row.appendChild(document.createElement("span"));
      part.className = className;
      part.textContent = text;
    };
    const label = this._catalogue.className(labels[index]) || "no label";
    const predicted = this._catalogue.className(predictions[index]);
    const isSurprise = isWrong || (labels[index] < 0 && predicted);
    add("row-name", isSurprise ? `${label} → ${predicted}` : label);
    if (this._catalogue.isBuilt(index)) {
      add(...{ true: ["wrong", "✗"], false: ["right", "✓"], null: ["", ""] }[isWrong]);
      add("row-id", ids[index]);
      add("row-error", percent(errors[index]));
    } else {
      add("wrong", "failed");
      add("row-id", ids[index]);
    }
    return row;
  }
}
