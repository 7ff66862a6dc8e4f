// The data of the page: base64 -> gzip -> JSON and typed arrays, as telemetry/columns.py packs them.
const TYPES = {
  int8: Int8Array, uint8: Uint8Array, int16: Int16Array, uint16: Uint16Array, int32: Int32Array,
  uint32: Uint32Array, float16: Uint16Array, float32: Float32Array, float64: Float64Array,
};

/** Every float16 as a number, by its bits. */
const HALVES = Float32Array.from({ length: 65536 }, (_, bits) => {
  const sign = bits & 0x8000 ? -1 : 1, power = (bits >> 10) & 31, part = bits & 1023;
  if (power === 31) return part ? NaN : sign * Infinity;
  return sign * (power ? (1 + part / 1024) * 2 ** (power - 15) : part * 2 ** -24);
});

/** A column of float16: `at(i)` as the other arrays have it. */
class Halves {
  constructor(bits) { this.bits = bits; this.length = bits.length; }
  at(i) { return HALVES[this.bits[i]]; }
}

function lower(tree, buffer, start) {
  if (Array.isArray(tree)) return tree.map(value => lower(value, buffer, start));
  if (tree === null || typeof tree !== "object") return tree;
  if (tree.$) {
    const [name, offset, count] = tree.$, array = new TYPES[name](buffer, start + offset, count);
    return name === "float16" ? new Halves(array) : array;
  }
  return Object.fromEntries(Object.entries(tree).map(([k, v]) => [k, lower(v, buffer, start)]));
}

async function readData() {
  const text = atob(document.getElementById("data").textContent.trim());
  const zipped = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) zipped[i] = text.charCodeAt(i);
  const stream = new Blob([zipped]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const size = new DataView(buffer).getUint32(0, true);
  const header = new TextDecoder().decode(new Uint8Array(buffer, 4, size));
  return lower(JSON.parse(header), buffer, Math.ceil((4 + size) / 8) * 8);
}
