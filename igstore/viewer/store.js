// Reading an igstore store over HTTP: what igstore.reader does, with zarrita.

import * as zarr from "./vendor/zarrita.bundle.js";

const FORMAT_VERSIONS = [1, 2];
export const [NOT_BUILT, BUILT] = [0, 1]; // `status` of an image
const REQUESTS = 32; // under way at a time
const REMEMBERED = 32; // things read that are kept, of each kind, for going back and forth

// Something to tell the user: what is the matter, and what to do about it. `isFatal`: nothing at all can be shown.
export class StoreError extends Error {
  constructor(message, remedy = "", { isFatal = false } = {}) {
    super(message);
    this.remedy = remedy;
    this.isFatal = isFatal;
  }
}

function damage(path, what) {
  return new StoreError(`The store is damaged: its file ${path.slice(1)} ${what}.`, "`igstore verify` says more.");
}

// Browsers without Float16Array read the numbers' bits, which `numbers` decodes.
globalThis.Float16Array ??= class extends Uint16Array {};

function numbers(data, dataType) {
  if (dataType !== "float16" || !(data instanceof Uint16Array)) return data;
  return Float32Array.from(data, (bits) => {
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    const size = exponent ? (1024 + fraction) * 2 ** (exponent - 25) : fraction * 2 ** -24; // maps are finite
    return bits & 0x8000 ? -size : size;
  });
}

// Browsers give up on thousands of requests at once, which is what a list in small chunks asks for.
let running = 0;
const waiting = [];

async function fetchInTurn(request) {
  if (running >= REQUESTS) await new Promise((start) => waiting.push(start));
  running++;
  try {
    return await fetch(request);
  } finally {
    running--;
    waiting.shift()?.();
  }
}

async function fetchPart(request) {
  const { origin } = new URL(request.url);
  let response;
  try {
    response = await fetchInTurn(request);
  } catch {
    throw new StoreError(
      `No answer from ${origin}.`,
      "Is `igstore view` still running? A store on another host must allow this page to read it (CORS).",
      { isFatal: true },
    );
  }
  if (request.headers.has("Range") && response.status === 200) {
    await response.body?.cancel();
    throw new StoreError(
      `The server at ${origin} does not send parts of files, and without that no single image can be read.`,
      "Use `igstore view STORE`, or a web server with range support, such as nginx, Caddy or an S3 bucket; " +
        "`python -m http.server` has none.",
      { isFatal: true },
    );
  }
  return response;
}

class PartStore extends zarr.FetchStore {
  constructor(url) {
    super(url, { fetch: fetchPart });
  }

  // Only what must be there is read in parts: shards that have a record.
  async getRange(key, range, options) {
    const bytes = await super.getRange(key, range, options);
    const expected = range.length ?? range.suffixLength;
    if (bytes?.length !== expected) {
      const found = bytes ? `has ${bytes.length} of ${expected} bytes where an image should be` : "is missing";
      throw damage(key, found);
    }
    return bytes;
  }
}

// What `make` gives, kept for the last `REMEMBERED` keys.
function remembering(make) {
  const kept = new Map();
  return (key) => {
    const value = kept.get(key) ?? make(key);
    kept.delete(key);
    kept.set(key, value); // the newest comes last
    value.catch(() => kept.delete(key));
    if (kept.size > REMEMBERED) kept.delete(kept.keys().next().value);
    return value;
  };
}

export class Store {
  static async open(url) {
    const missing = new StoreError(
      `There is no igstore store at ${url}.`,
      "Start this page with `igstore view STORE`, or give the store's address: `?store=URL`.",
      { isFatal: true },
    );
    const files = new PartStore(url);
    let nodes;
    try {
      nodes = await zarr.withConsolidatedMetadata(files, { format: "v3" });
    } catch (error) {
      throw zarr.isZarritaError(error) ? missing : error;
    }
    const group = await zarr.open.v3(zarr.root(nodes), { kind: "group" });
    const version = group.attrs.format_version;
    if (version === undefined) throw missing;
    if (!FORMAT_VERSIONS.includes(version)) {
      throw new StoreError(
        `The store at ${url} has the format version ${version}; this page reads ${FORMAT_VERSIONS.join(" and ")}.`,
        "Use the page of the igstore that wrote it.",
        { isFatal: true },
      );
    }
    // tells at once whether the server sends parts; the browser's cache, which has this file by now, would pretend so
    await files.getRange("/zarr.json", { offset: 0, length: 1 }, { cache: "no-store" });
    const store = new Store(url, files, nodes, group.attrs);
    store.ids = await store.column("image_id");
    return store;
  }

  constructor(url, files, nodes, attributes) {
    this.name = decodeURIComponent(new URL(url).pathname.split("/").filter(Boolean).at(-1) ?? "");
    this.attributes = attributes;
    this.nImages = attributes.n_images;
    this.size = attributes.crop; // [height, width]
    this._files = files;
    this._nodes = nodes;
    const kinds = new Map(nodes.contents().map(({ path, kind }) => [path, kind]));
    this._arrays = new Set([...kinds.keys()].filter((path) => kinds.get(path) === "array"));
    // the names of the rankings, such as positive-3
    this.rankings = [...this._arrays].map((path) => path.match(/^\/ranks\/(.+)\/share$/)?.[1]).filter(Boolean).sort();
    // an array keeps the indexes of its shards
    this._array = remembering((name) => zarr.open.v3(zarr.root(nodes).resolve(name), { kind: "array" }));
    this._record = remembering((path) => this._readRecord(path));
    this._shard = remembering((key) => this._readShard(...key.split(" ")));
    this.image = remembering((index) => this._readImage(index));
    this._ranks = remembering((key) => this._readRanks(...key.split(" ")));
  }

  has(name) {
    return this._arrays.has(`/${name}`);
  }

  // A per-image variable, whole.
  column(name) {
    return this._read(name, 0, this.nImages); // an array that is being extended may be longer
  }

  // rank and share (block_y * block_x) of an image that is built.
  ranks(index, ranking) {
    return this._ranks(`${index} ${ranking}`);
  }

  // What is stored of one image: {pixels, attribution} or null for what the store does not hold, and its scalars.
  async _readImage(index) {
    const record = await this._shardRecord(index);
    if (!record) {
      throw new StoreError("This image is not built yet.", "Run `igstore build` with the store's settings to go on.");
    }
    const reason = new Map(Object.entries(record.failed)).get(this.ids[index]);
    if (reason !== undefined) throw new StoreError(`This image could not be attributed: ${reason}.`);
    const { shard_size } = this.attributes;
    const maps = ["pixels", "attribution"].map((name) => (this.has(name) ? this._read(name, index, index + 1) : null));
    const scalars = ["scale", "output", "baseline_output", "n_steps"].map(async (name) => {
      const values = await this._shard(`${name} ${Math.floor(index / shard_size)}`);
      return [name, values[index % shard_size]];
    });
    const [pixels, attribution, ...values] = await Promise.all([...maps, ...scalars]);
    return { pixels, attribution, ...Object.fromEntries(values) };
  }

  // A per-image variable, of one shard.
  _readShard(name, shard) {
    const { shard_size } = this.attributes;
    return this._read(name, shard * shard_size, (Number(shard) + 1) * shard_size);
  }

  async _readRanks(number, ranking) {
    const index = Number(number);
    const [, score, block] = ranking.match(/^(.*)-(\d+)$/) ?? [null, ranking, ""];
    const unranked = (message) =>
      new StoreError(message, `Make them with \`igstore rank ${this.name} --score ${score} --block ${block}\`.`);
    if (!this.rankings.includes(ranking)) throw unranked(`This store has no ranks ${ranking}, and so no masks.`);
    const [built, ranked] = await Promise.all([this._shardRecord(index), this._shardRecord(index, ranking)]);
    const maps = Object.keys(built?.files ?? {}).find((file) => file.startsWith("attribution/"));
    if (!built || !ranked || (maps && ranked.attribution_sha256 !== built.files[maps].sha256)) {
      throw unranked(`This image has no ranks ${ranking}, or its map is newer than they are.`);
    }
    const [rank, share] = await Promise.all(
      ["rank", "share"].map((name) => this._read(`ranks/${ranking}/${name}`, index, index + 1)),
    );
    return { rank, share, block: Number(block) };
  }

  // The record of the shard that holds an image; null if the shard is not finished, as igstore.reader has it.
  async _shardRecord(index, ranking = null) {
    const size = this.attributes.shard_size;
    const shard = Math.floor(index / size);
    const folder = ranking ? `/records/${ranking}` : "/records";
    const record = await this._record(`${folder}/${String(shard).padStart(5, "0")}.json`);
    const bounds = [shard * size, Math.min((shard + 1) * size, this.nImages)];
    return record && bounds.every((bound, place) => record.images[place] === bound) ? record : null;
  }

  async _readRecord(path) {
    const bytes = await this._files.get(path);
    if (!bytes) return null;
    try {
      const { images, files, failed = {}, attribution_sha256 } = JSON.parse(new TextDecoder().decode(bytes));
      if (Array.isArray(images) && files && failed) return { images, files, failed, attribution_sha256 };
    } catch {
      // told below
    }
    throw damage(path, "is not a record");
  }

  // The values of an array for the images from `first` to before `stop`, one after the other.
  async _read(name, first, stop) {
    try {
      const array = await this._array(name);
      const { data } = await zarr.get(array, [zarr.slice(first, stop), ...array.shape.slice(1).map(() => null)]);
      return numbers(data, array.dtype);
    } catch (error) {
      if (!zarr.isZarritaError(error)) throw error;
      throw new StoreError(
        `The array ${name} cannot be read: ${error.message}.`,
        "The page reads stores that are uncompressed, or compressed with zstd or gzip.",
      );
    }
  }
}
