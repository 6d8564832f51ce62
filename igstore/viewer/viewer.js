// The page: what is chosen, what is read, what is drawn.

import { Catalogue } from "./catalogue.js";
import { ImageList } from "./list.js";
import { FILLS, SELECTIONS, expand, visibleBlocks } from "./masks.js";
import { heatMap, maskPicture, photograph } from "./pictures.js";
import { KEEPS, formatHash, parseHash, tenthsOf } from "./state.js";
import { Store, StoreError } from "./store.js";
import { measured, percent, whole } from "./words.js";

const USUAL_RANKING = "positive-3";
const ADDRESS_DELAY = 300; // ms: browsers refuse addresses that change all the time
const BLOCK = 3; // of the heat map, where there is no ranking

const part = (id) => document.getElementById(id);

// What is the matter, and what to do about it; `code` in back quotes.
function tell(error, message, remedy) {
  if (!(error instanceof StoreError)) console.error(error);
  const isOurs = error instanceof StoreError;
  write(message, isOurs ? error.message : `Something unexpected happened: ${error.message}`);
  write(remedy, isOurs ? error.remedy : "Reload the page; if it happens again, please report it.");
}

function write(element, text) {
  const pieces = text.split(/`([^`]*)`/).map((piece, place) => {
    if (place % 2 === 0) return piece;
    const code = document.createElement("code");
    code.textContent = piece;
    return code;
  });
  element.replaceChildren(...pieces);
}

function paint(canvas, picture) {
  canvas.width = picture.width;
  canvas.height = picture.height;
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

class Page {
  constructor(store, catalogue) {
    this.store = store;
    this.catalogue = catalogue;
    const { rankings } = store;
    this.usualRanking = rankings.includes(USUAL_RANKING) ? USUAL_RANKING : (rankings[0] ?? USUAL_RANKING);
    this.state = parseHash(location.hash);
    this.read = null; // what is read of the image that is shown
    this.list = new ImageList(part("list"), catalogue, (index) => this.pick(index));
    this.describeStore();
    this.listen();
  }

  get index() {
    return this.catalogue.indexOf.get(this.state.image) ?? null;
  }

  get ranking() {
    return this.state.ranking ?? this.usualRanking;
  }

  // What is chosen

  change(changes) {
    const before = this.state;
    this.state = { ...before, ...changes };
    const differs = (...names) => names.some((name) => this.state[name] !== before[name]);
    this.showControls();
    if (differs("search", "wrong", "sort")) this.showList();
    if (differs("image", "ranking")) this.showImage();
    else this.drawMask();
    this.keepAddress();
  }

  start() {
    this.showControls();
    this.showList();
    const first = this.list.images[0] ?? this.catalogue.built[0];
    if (this.state.image === null && first !== undefined) this.state.image = this.catalogue.ids[first];
    this.showImage();
    this.keepAddress();
  }

  pick(index) {
    if (index === null) return;
    this.change({ image: this.catalogue.ids[index] });
    browse(false);
  }

  keepAddress() {
    clearTimeout(this.addressTimer);
    this.addressTimer = setTimeout(
      () => history.replaceState(null, "", formatHash(this.state, this.usualRanking)),
      ADDRESS_DELAY,
    );
  }

  listen() {
    const next = (steps) => this.pick(this.list.neighbour(steps));
    part("previous").addEventListener("click", () => next(-1));
    part("next").addEventListener("click", () => next(1));
    part("search").addEventListener("input", (event) => this.change({ search: event.target.value }));
    part("wrong").addEventListener("change", (event) => this.change({ wrong: event.target.checked }));
    part("sort").addEventListener("change", (event) => this.change({ sort: event.target.value }));
    part("p").addEventListener("input", (event) => this.change({ tenths: tenthsOf(event.target.value) }));
    part("p-exact").addEventListener("change", (event) => this.change({ tenths: tenthsOf(event.target.value) }));
    part("ranking").addEventListener("change", (event) => this.change({ ranking: event.target.value }));
    part("controls").addEventListener("change", ({ target }) => {
      if (target.type === "radio") this.change({ [target.name]: target.value });
      if (!target.matches(":focus-visible")) target.blur(); // it was the mouse: arrow keys go to the images
    });
    part("controls").addEventListener("submit", (event) => event.preventDefault());
    addEventListener("hashchange", ({ newURL }) => {
      const asked = parseHash(new URL(newURL).hash); // keepAddress may have changed location.hash meanwhile
      this.change({ ...asked, image: asked.image ?? this.state.image });
    });
    const following = (choices, value) => choices[(choices.indexOf(value) + 1) % choices.length];
    const raise = (tenths) => this.change({ tenths: Math.min(1000, Math.max(0, this.state.tenths + tenths)) });
    const keys = {
      ArrowLeft: () => next(-1),
      ArrowRight: () => next(1),
      ArrowUp: (event) => raise(event.shiftKey ? 100 : 10),
      ArrowDown: (event) => raise(event.shiftKey ? -100 : -10),
      k: () => this.change({ keep: following(KEEPS, this.state.keep) }),
      s: () => this.change({ select: following(Object.keys(SELECTIONS), this.state.select) }),
      f: () => this.change({ fill: following(Object.keys(FILLS), this.state.fill) }),
      "/": () => {
        browse(true);
        part("search").select();
      },
    };
    addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      if (event.target === part("search") && ["Enter", "Escape"].includes(event.key)) part("list").focus();
      if (event.target.matches("input, select")) return; // they have their own keys
      const inList = { ArrowUp: keys.ArrowLeft, ArrowDown: keys.ArrowRight };
      const act = (event.target === part("list") && inList[event.key]) || keys[event.key];
      if (!act) return;
      event.preventDefault();
      act(event);
    });
  }

  // What is shown

  describeStore() {
    const { attributes, name, nImages } = this.store;
    const { model, weights, method, n_steps, max_steps, baseline, target, output, maps_by } = attributes;
    const steps = max_steps ? `${n_steps} to ${max_steps}` : n_steps;
    const built = this.catalogue.built.length;
    const images = built === nImages ? `${whole(nImages)} images` : `${whole(built)} of ${whole(nImages)} images built`;
    part("store-name").textContent = name;
    part("provenance").textContent =
      `${model}, weights ${weights} · ${images} · ` +
      (maps_by
        ? `maps of the ${target}, made by ${maps_by}`
        : `Integrated Gradients of the ${target}'s ${output}: ${method}, ${steps} steps, baseline ${baseline}`);
    part("ranking").replaceChildren(...this.store.rankings.map((ranking) => new Option(ranking)));
    part("ranking-choice").hidden = this.store.rankings.length < 2;
    part("fill").hidden = !this.store.has("pixels");
  }

  showControls() {
    const { tenths, search, wrong, sort } = this.state;
    const p = String(tenths / 10);
    part("p").value = p;
    if (part("p-exact").value !== p) part("p-exact").value = p;
    for (const radio of part("controls").querySelectorAll("[type=radio]")) {
      radio.checked = this.state[radio.name] === radio.value;
    }
    part("ranking").value = this.ranking;
    if (part("search").value !== search) part("search").value = search;
    part("wrong").checked = wrong;
    part("sort").value = sort;
  }

  showList() {
    const images = this.catalogue.find(this.state);
    const count = `${whole(images.length)} ${images.length === 1 ? "image" : "images"}`;
    part("count").textContent = images.length ? count : "No image matches.";
    part("browse-toggle").textContent = `${count}: list and search`;
    this.list.show(images);
    this.showNeighbours();
  }

  showNeighbours() {
    part("previous").disabled = this.list.neighbour(-1) === null;
    part("next").disabled = this.list.neighbour(1) === null;
  }

  async showImage() {
    const { index, ranking, catalogue, store } = this;
    part("main").setAttribute("aria-busy", "true");
    this.list.choose(index);
    this.showNeighbours();
    const reading = (this.reading = this.readImage(index, ranking));
    const read = await reading;
    if (reading !== this.reading) return; // another image has been picked meanwhile
    if (read.trouble?.isFatal) {
      stop(read.trouble);
      return;
    }
    this.read = read;
    this.describeImage();
    this.drawImage();
    this.drawMask();
    part("main").setAttribute("aria-busy", "false");
    for (const neighbour of [this.list.neighbour(1), this.list.neighbour(-1)]) {
      if (neighbour !== null && catalogue.isBuilt(neighbour)) {
        store.image(neighbour).catch(() => {}); // it is told when it is picked
        store.ranks(neighbour, ranking).catch(() => {});
      }
    }
  }

  // {index, image, ranks, trouble}: null for what there is not; trouble is an error to tell.
  async readImage(index, ranking) {
    if (index === null) {
      const { image } = this.state;
      const which = image === null ? "No image of this store is built yet." : `This store has no image "${image}".`;
      return { index, image: null, ranks: null, trouble: new StoreError(which) };
    }
    const [image, ranks] = await Promise.allSettled([this.store.image(index), this.store.ranks(index, ranking)]);
    return {
      index,
      image: image.value ?? null,
      ranks: image.value && ranks.value ? ranks.value : null,
      trouble: image.reason ?? ranks.reason ?? null,
    };
  }

  describeImage() {
    const { read, catalogue } = this;
    const { index, image, trouble } = read;
    part("trouble").hidden = trouble === null;
    if (trouble) tell(trouble, part("trouble-message"), part("trouble-remedy"));
    if (index === null) {
      part("label").textContent = "";
      part("image-id").textContent = "";
    } else {
      const label = catalogue.className(catalogue.labels[index]) || "no label";
      const wrong = catalogue.isWrong(index);
      const predicted = catalogue.className(catalogue.predictions[index]);
      part("label").textContent = label;
      const verdict = document.createElement("span");
      verdict.className = wrong === null ? "" : wrong ? "wrong" : "right";
      const mark = wrong === null ? "" : wrong ? "✗\u00a0" : "✓\u00a0";
      verdict.textContent = predicted ? `${mark}predicted ${predicted}` : "";
      part("image-id").replaceChildren(catalogue.ids[index], predicted ? " · " : "", verdict);
      document.title = `${label} · ${catalogue.ids[index]} · igstore view`;
    }
    const facts = image ? this.facts() : [];
    part("facts").hidden = !image;
    part("facts").replaceChildren(
      ...facts.map(([name, value, note = ""]) => {
        const fact = document.createElement("div");
        fact.appendChild(document.createElement("dt")).textContent = name;
        fact.appendChild(document.createElement("dd")).textContent = value;
        fact.appendChild(document.createElement("dd")).textContent = note;
        return fact;
      }),
    );
  }

  facts() {
    const { catalogue, read } = this;
    const { labels, predictions, targets, errors, wnids } = catalogue;
    const { output, baseline_output, n_steps } = read.image;
    const named = (number) =>
      number < 0 ? ["–"] : [catalogue.className(number), [number, wnids[number]].join(" · ")];
    return [
      ["Label", ...named(labels[read.index])],
      ["Prediction, unmasked", ...named(predictions[read.index])],
      ["Class attributed", ...named(targets[read.index])],
      ["Its output f(x)", measured(output)],
      ["On the baseline f(b)", measured(baseline_output)],
      ["Completeness error", percent(errors[read.index])],
      ["Steps", n_steps === null ? "–" : whole(n_steps)],
    ];
  }

  drawImage() {
    const { image, ranks } = this.read;
    const { size, attributes } = this.store;
    part("original-figure").hidden = !image?.pixels;
    part("attribution-figure").hidden = !image?.attribution;
    if (image?.pixels) {
      paint(part("original"), photograph(image.pixels, size));
      part("original-note").textContent = `what the model sees, ${size[1]}×${size[0]}`;
    }
    if (image?.attribution) {
      const block = ranks?.block ?? BLOCK;
      const { image: picture, full } = heatMap(image.attribution, size, block);
      paint(part("attribution"), picture);
      const most = measured(full * image.scale);
      part("attribution-note").textContent = `${attributes.output} per ${block}×${block} block`;
      part("against").textContent = `against −${most}`;
      part("for").textContent = `for +${most}`;
    }
  }

  drawMask() {
    const { store, state, read } = this;
    const image = read?.image;
    const ranks = read?.ranks;
    part("masked-figure").hidden = part("controls").hidden = part("meaning").hidden = part("python").hidden = !ranks;
    if (!ranks) return;
    const { rank, share, block } = ranks;
    const blocks = visibleBlocks(rank, share, state);
    const visible = expand(blocks, ...store.size, block);
    const fill = image.pixels && FILLS[state.fill](image.pixels, store.attributes.mean);
    paint(
      part("masked"),
      image.pixels ? photograph(image.pixels, store.size, visible, fill) : maskPicture(visible, store.size),
    );
    part("masked-name").textContent = image.pixels ? "Masked" : "Mask, light where visible";
    const shown = visible.reduce((total, value) => total + value, 0) / visible.length;
    part("visible").textContent = `${percent(shown)} of the pixels visible`;
    this.explain(blocks);
  }

  // The mask in words, and in Python.
  explain(blocks) {
    const { tenths, keep, select, fill, image } = this.state;
    const { block } = this.read.ranks;
    const p = String(tenths / 10);
    const score = this.ranking.slice(0, this.ranking.lastIndexOf("-"));
    const visible = blocks.reduce((total, value) => total + value, 0);
    const top = keep === "top" ? visible : blocks.length - visible;
    const chosen =
      select === "mass"
        ? `the fewest ${block}×${block} blocks that hold ${p}% of the image's ${score} attribution`
        : `the ${p}% of the ${block}×${block} blocks with the most ${score} attribution`;
    part("meaning").textContent =
      `${keep === "top" ? "Shown" : "Hidden"}: ${chosen}, which are ${whole(top)} of ${whole(blocks.length)}.`;
    const hasPixels = Boolean(this.read.image.pixels);
    const options = [
      ["p", p],
      ["keep", `"${keep}"`],
      ...(select === "mass" ? [] : [["select", `"${select}"`]]),
      ...(score === "positive" ? [] : [["score", `"${score}"`]]),
      ...(block === 3 ? [] : [["block", block]]),
      ...(hasPixels && fill !== "black" ? [["fill", `"${fill}"`]] : []),
    ];
    const call = options.map(([name, value]) => `${name}=${value}`).join(", ");
    part("snippet").textContent =
      `igstore.${hasPixels ? "masked_view" : "keep_mask"}(${JSON.stringify(this.store.name)}, ${call})` +
      `.sel(image=${JSON.stringify(image)})`;
  }
}

// Instead of the page: why nothing can be shown.
function stop(error) {
  tell(error, part("notice-message"), part("notice-remedy"));
  part("notice").hidden = false;
  part("page").hidden = true;
}

// Open or close the list of images, which is always open where there is room for it.
function browse(isOpen) {
  part("browse-toggle").ariaExpanded = String(isOpen);
}

async function begin() {
  part("notice-remedy").replaceChildren();
  part("browse-toggle").addEventListener("click", ({ target }) => browse(target.ariaExpanded === "false"));
  try {
    const asked = new URLSearchParams(location.search).get("store");
    const beside = document.querySelector("meta[name=igstore-store]").content;
    const store = await Store.open(new URL(asked ?? beside, document.baseURI).href);
    const page = new Page(store, await Catalogue.read(store));
    part("notice").hidden = true;
    part("page").hidden = false;
    page.start();
  } catch (error) {
    stop(error);
  }
}

begin();
