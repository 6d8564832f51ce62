// What igstore.masks does, for one image: which blocks are visible, and what becomes of the pixels of the others.
// p comes in tenths of a percent, a whole number, so that every comparison is exact.

// The top set, as 1 for every block in it: (rank, share, tenths) => Uint8Array (block_y * block_x).
export const SELECTIONS = {
  // igstore compares float32 shares with p/100 rounded to float32
  mass(rank, share, tenths) {
    const threshold = Math.fround(tenths / 10 / 100);
    return Uint8Array.from(share, (value) => value < threshold);
  },
  // 100 * rank < p * blocks, in whole numbers
  count(rank, share, tenths) {
    return Uint8Array.from(rank, (place) => 1000 * place < tenths * rank.length);
  },
};

// The colour of hidden pixels: (pixels, meanColour) => [red, green, blue]. Pixels are (channel, y, x), in that order.
export const FILLS = {
  black: () => [0, 0, 0],
  mean: (pixels, meanColour) => meanColour.map((part) => Math.min(255, Math.max(0, Math.floor(255 * part + 0.5)))),
  image_mean(pixels) {
    const size = pixels.length / 3;
    return [0, 1, 2].map((channel) => {
      const sum = pixels.subarray(channel * size, (channel + 1) * size).reduce((total, value) => total + value, 0);
      return Math.floor((2 * sum + size) / (2 * size));
    });
  },
};

// 1 for every block that stays visible.
export function visibleBlocks(rank, share, { tenths, keep, select }) {
  const top = SELECTIONS[select](rank, share, tenths);
  return keep === "top" ? top : top.map((inTopSet) => 1 - inTopSet);
}

// Every block's value on each of its pixels: (block_y * block_x) to (y * x).
export function expand(blocks, height, width, block) {
  const across = Math.ceil(width / block);
  const values = new blocks.constructor(height * width);
  for (let y = 0; y < height; y++) {
    const row = Math.floor(y / block) * across;
    for (let x = 0; x < width; x++) values[y * width + x] = blocks[row + Math.floor(x / block)];
  }
  return values;
}
