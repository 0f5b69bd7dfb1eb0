/** Names of downloaded pictures: their prompt, in every script, as every file system takes it. */

/** Bytes of UTF-8, without the extension: file systems take 255, and browsers add " (1)". */
const MAX_BYTES = 120;
/** Names that Windows keeps for devices. */
const RESERVED = /^(con|prn|aux|nul|com\d|lpt\d)$/;

/** Storage sets the file name of a download; the attribute `download` has no effect on another origin. */
export function downloadUrl(url: string, prompt = ""): string {
  const address = new URL(url);
  const extension = address.pathname.split(".").at(-1);
  address.searchParams.set("download", `${fileName(prompt)}.${extension}`);
  return address.href;
}

/** Returns a prompt as the name of a file: letters, marks and digits of every script, and hyphens. */
export function fileName(prompt: string): string {
  const words = prompt.normalize("NFC").toLowerCase().replace(/[^\p{L}\p{M}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "");
  const name = cut(words);
  return name === "" || RESERVED.test(name) ? `image${name && `-${name}`}` : name;
}

/** Cuts a name to MAX_BYTES: between two letters as they are read, and between two words where there are some. */
function cut(name: string): string {
  const size = (text: string) => new TextEncoder().encode(text).length;
  if (size(name) <= MAX_BYTES) return name;
  let short = "";
  for (const { segment } of new Intl.Segmenter().segment(name)) {
    if (size(short + segment) > MAX_BYTES) break;
    short += segment;
  }
  const end = short.lastIndexOf("-");
  return end > short.length / 2 ? short.slice(0, end) : short.replace(/-+$/, "");
}
