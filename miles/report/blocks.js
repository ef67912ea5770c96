// Blocks of data: gzip in base64 in elements of their own (miles/report/blocks.py), unpacked when asked for.

const MISSING = -(2 ** 31);

async function unpack(name) {
  const element = byId(`block-${name}`);
  if (!element) throw new Error(`the report has no block ${name}: it was cut off`);
  const text = atob(element.textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

const unpackJson = async (name) => JSON.parse(new TextDecoder().decode(await unpack(name)));

/** Columns of numbers: `{name: Float64Array}`, NaN where there is none. */
async function unpackColumns(name) {
  const bytes = await unpack(name);
  const length = new DataView(bytes.buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length)));
  const columns = {};
  let at = 4 + length;
  header.names.forEach((column, index) => {
    const n = header.count;
    const parts = [0, 1, 2, 3].map((part) => bytes.subarray(at + part * n, at + (part + 1) * n));
    const scale = header.scales[index];
    const values = new Float64Array(n);
    for (let i = 0; i < n; i++) {
      const whole = parts[0][i] | (parts[1][i] << 8) | (parts[2][i] << 16) | (parts[3][i] << 24);
      values[i] = whole === MISSING ? NaN : whole * scale;
    }
    columns[column] = values;
    at += 4 * n;
  });
  return columns;
}

/** Run a library out of a block. */
async function unpackScript(name) {
  const url = URL.createObjectURL(new Blob([await unpack(name)], { type: "text/javascript" }));
  await new Promise((resolve, reject) => {
    document.head.append(el("script", { src: url, onload: resolve, onerror: () => reject(new Error(`${name} did not run`)) }));
  });
  URL.revokeObjectURL(url);
}

/** Remembers the newest `size` answers of an asynchronous function of one key. */
function remembering(f, size) {
  const known = new Map();
  return (key) => {
    const found = known.get(key) ?? f(key);
    known.delete(key);
    known.set(key, found);
    if (known.size > size) known.delete(known.keys().next().value);
    return found;
  };
}
