// Pixels, masks and maps as pictures for a canvas: ImageData of the image's own size.

import { expand } from "./masks.js";

// Okabe and Ito's vermillion and blue, which colour-blind readers tell apart too
const FOR_TARGET = [213, 94, 0];
const AGAINST_TARGET = [0, 114, 178];
const FULL_COLOUR = 0.99; // this quantile of an image's absolute values and all above it get the full colour

const VISIBLE = [240, 240, 240]; // of a mask without pixels
const HIDDEN = [32, 32, 32];

// The picture whose pixel `place`, counted row by row, has the value `valueOf(channel, place)` in each channel.
function picture([height, width], valueOf) {
  const image = new ImageData(width, height);
  for (let place = 0; place < height * width; place++) {
    for (let channel = 0; channel < 3; channel++) image.data[4 * place + channel] = valueOf(channel, place);
    image.data[4 * place + 3] = 255; // opaque
  }
  return image;
}

// Pixels (channel, y, x); where `visible` (y, x) is given, those that it hides have the colour `fill`.
export function photograph(pixels, size, visible = null, fill = null) {
  const area = size[0] * size[1];
  return picture(size, (channel, place) =>
    !visible || visible[place] ? pixels[channel * area + place] : fill[channel],
  );
}

// A mask alone: light where visible.
export function maskPicture(visible, size) {
  return picture(size, (channel, place) => (visible[place] ? VISIBLE : HIDDEN)[channel]);
}

// A map (y, x), or (channel, y, x) which is summed first, in sums over blocks: vermillion where it speaks for the
// target, blue where against. `full` is the value from which on the colour is full.
export function heatMap(attribution, [height, width], block) {
  const sums = blockSums(attribution, height, width, block);
  const strengths = Float64Array.from(sums, Math.abs).sort();
  const full = quantile(strengths, FULL_COLOUR) || strengths.at(-1) || 1;
  const values = expand(sums, height, width, block);
  const image = picture([height, width], (channel, place) => {
    const strength = Math.min(Math.abs(values[place]) / full, 1);
    const colour = values[place] > 0 ? FOR_TARGET : AGAINST_TARGET;
    return Math.round(255 + (colour[channel] - 255) * strength);
  });
  return { image, full };
}

function blockSums(attribution, height, width, block) {
  const across = Math.ceil(width / block);
  const sums = new Float64Array(across * Math.ceil(height / block));
  for (let place = 0; place < attribution.length; place++) {
    const pixel = place % (height * width);
    const y = Math.floor(pixel / width);
    sums[Math.floor(y / block) * across + Math.floor((pixel - y * width) / block)] += attribution[place];
  }
  return sums;
}

function quantile(sorted, share) {
  const place = (sorted.length - 1) * share;
  const below = Math.floor(place);
  const above = Math.min(below + 1, sorted.length - 1);
  return sorted[below] + (sorted[above] - sorted[below]) * (place - below);
}
