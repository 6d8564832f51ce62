// Numbers for people.

// A share as a percentage: 3.5%, ∞, – where there is none.
export function percent(share) {
  if (Number.isFinite(share)) return `${(100 * share).toFixed(1)}%`;
  return share === Infinity ? "∞" : "–";
}

export function whole(number) {
  return number.toLocaleString("en");
}

// A measured number with three digits.
export function measured(number) {
  if (number === null || !Number.isFinite(number)) return "–";
  return String(Number(number.toPrecision(3))).replace("-", "−");
}
