// What the page needs of zarrita. Its codecs blosc, lz4 and zstd are WebAssembly of 1.4 MB; igstore writes none of the
// first two, and reads the last with fzstd in 8 kB.
import { decompress } from "fzstd";
import { registry } from "zarrita";

export { FetchStore, get, isZarritaError, open, root, slice, withConsolidatedMetadata } from "zarrita";

class Zstd {
  kind = "bytes_to_bytes";

  static fromConfig() {
    return new Zstd();
  }

  decode(bytes) {
    return decompress(bytes);
  }
}

for (const name of ["blosc", "lz4", "zstd"]) {
  registry.delete(name);
  registry.delete(`numcodecs.${name}`);
}
registry.set("zstd", () => Zstd);
