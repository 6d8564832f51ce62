// The images of a store as a list to search, filter and sort.

import { BUILT, NOT_BUILT } from "./store.js";

// Orders of the list: (catalogue) => compare(index, index).
export const SORTS = {
  id: () => (a, b) => a - b,
  worst: ({ errors }) => (a, b) => descending(errors[a], errors[b]) || a - b,
  best: ({ errors }) => (a, b) => descending(errors[b], errors[a]) || a - b,
};

function descending(a, b) {
  return a > b ? -1 : a < b ? 1 : 0; // unlike b - a, also of infinities
}

export class Catalogue {
  static async read(store) {
    const names = ["label", "target", "prediction", "completeness_error", "status"];
    return new Catalogue(store, await Promise.all(names.map((name) => store.column(name))));
  }

  constructor(store, [labels, targets, predictions, errors, statuses]) {
    Object.assign(this, { ids: store.ids, labels, targets, predictions, errors, statuses });
    this.classNames = store.attributes.class_names ?? [];
    this.wnids = store.attributes.wnids ?? [];
    this.indexOf = new Map(this.ids.map((id, index) => [id, index]));
    this.built = [...this.ids.keys()].filter((index) => statuses[index] === BUILT);
    const isListed = (index) => statuses[index] !== NOT_BUILT;
    this._listed = [...this.ids.keys()].filter(isListed);
    this._texts = this.ids.map((id, index) => {
      const classes = [labels[index], predictions[index]];
      const words = classes.flatMap((number) => [this.className(number), this.wnids[number] ?? ""]);
      return [id, ...words].join("\n").toLowerCase();
    });
  }

  className(number) {
    return number < 0 ? "" : (this.classNames[number] ?? `class ${number}`);
  }

  isBuilt(index) {
    return this.statuses[index] === BUILT;
  }

  // Whether the model's prediction is another class than the label; null where there is no label.
  isWrong(index) {
    return this.labels[index] < 0 || !this.isBuilt(index) ? null : this.predictions[index] !== this.labels[index];
  }

  // The numbers of the images that hold every word of `search` in their id or classes, in order.
  find({ search, wrong, sort }) {
    const words = search.toLowerCase().split(/\s+/).filter(Boolean);
    const isFound = (index) =>
      (!wrong || this.isWrong(index)) && words.every((word) => this._texts[index].includes(word));
    const found = this._listed.filter(isFound);
    if (sort === "id") return found;
    // failed images have no error
    const measured = found.filter((index) => this.isBuilt(index)).sort(SORTS[sort](this));
    return [...measured, ...found.filter((index) => !this.isBuilt(index))];
  }
}
