/**
 * One's own picture to start from: made smaller here, and uploaded into the private bucket `image-sources`, where members of
 * its workflow see it. It knows no framework.
 */
import type { SupabaseClient } from "@supabase/supabase-js";
import { SOURCES } from "./pictures";

/** What the bucket, and all providers, take. */
export const TYPES: readonly string[] = ["image/png", "image/jpeg", "image/webp"];
/** Pixels of the longer side: models see no more. */
const MAX_SIDE = 2048;
/** Bytes that are read; what is uploaded is smaller by far. */
const MAX_READ = 100 * 1024 ** 2;
/** Bytes from which on a picture without loss is uploaded with some. */
const MAX_LOSSLESS = 4 * 1024 ** 2;
const QUALITY = 0.92;
/** Files of a canvas, and rows of a request. */
const MAX_FILES = 1000, PAGE_SIZE = 500;
/** Milliseconds: a younger file may be that of a node which is not written yet. */
const YOUNG = 3_600_000;
/** Seconds. */
const SIGNED_FOR = 60;

/** Why a file is no source, in a sentence, and what to do. */
export class Refusal extends Error {
  readonly hint: string;
  /** Whether the canvas takes no more. */
  readonly isFull: boolean;

  constructor(message: string, hint: string, isFull = false) {
    super(message);
    this.hint = hint;
    this.isFull = isFull;
  }
}

interface Picture {
  blob: Blob;
  width: number;
  height: number;
}

/** Returns what a file is called in a sentence. */
export function nameOf(file: File): string {
  return file.name || "The pasted picture";
}

/**
 * Returns the picture of a file, upright, its longer side 2,048 pixels at most, without what the camera wrote into it.
 *
 * Throws a `Refusal` of what is no picture, or none that can be taken.
 */
export async function shrink(file: File): Promise<Picture> {
  const name = nameOf(file);
  if (!TYPES.includes(file.type)) {
    throw new Refusal(`${name} is not a PNG, JPEG or WebP picture.`, "Save it as one of these, and add that.");
  }
  if (file.size > MAX_READ) throw new Refusal(`${name} is larger than 100 MB.`, "Make it smaller first.");
  let bitmap: ImageBitmap;
  try {
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    throw new Refusal(`${name} cannot be read as a picture.`, "Open it elsewhere, save it anew, and add that.");
  }
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  const width = Math.max(1, Math.round(bitmap.width * scale)), height = Math.max(1, Math.round(bitmap.height * scale));
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  const drawing = canvas.getContext("2d");
  if (drawing) drawing.imageSmoothingQuality = "high";
  drawing?.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  const encode = (type: string) => new Promise<Blob | null>(resolve => canvas.toBlob(resolve, type, QUALITY));
  let blob = await encode(file.type === "image/jpeg" ? file.type : "image/png");
  if (blob && blob.type === "image/png" && blob.size > MAX_LOSSLESS) blob = (await encode("image/webp")) ?? blob;
  if (!drawing || !blob) throw new Refusal(`${name} is too large for this browser.`, "Make it smaller first.");
  return { blob, width, height };
}

/** Uploads a picture. Returns its path in the bucket; throws a `Refusal` where Storage, or the connection, refuses. */
export async function upload(supabase: SupabaseClient, workflowId: string, name: string, { blob }: Picture): Promise<string> {
  const path = `${workflowId}/${crypto.randomUUID()}.${blob.type.replace("image/", "").replace("jpeg", "jpg")}`;
  const { error } = await supabase.storage.from(SOURCES).upload(path, blob, { contentType: blob.type });
  if (!error) return path;
  const { statusCode, status } = error as { statusCode?: string; status?: number };
  const code = Number(statusCode ?? status ?? 0);
  if (code === 403) {
    const { data: isMember } = await supabase.rpc("can_open_workflow", { workflow_id: workflowId });
    if (isMember) {
      const hint = "It takes 1,000 pictures, or 2 GB of them, with those whose nodes were deleted. Make room, or take another canvas.";
      throw new Refusal(`${name} was not uploaded: this canvas is full.`, hint, true);
    }
    throw new Refusal(`${name} was not uploaded: you may not add pictures to this canvas.`, "Ask a member for a link.");
  }
  if (code >= 400 && code < 500) throw new Refusal(`${name} was not uploaded: ${error.message}`, "Try another picture.");
  throw new Refusal(`${name} was not uploaded: the server cannot be reached.`, "Add it again when the connection is back.");
}

/** Removes a picture that no node shows. Where that fails it stays, unseen. */
export async function discard(supabase: SupabaseClient, path: string): Promise<void> {
  await supabase.storage.from(SOURCES).remove([path]);
}

/**
 * Removes the pictures of a workflow that no node shows, no run in line starts from, and `kept` (paths) does not name; those of
 * the last hour stay, as their nodes may be on their way. Returns how many there were. Throws a `Refusal`, and removes nothing,
 * where the server refuses, or cannot be reached.
 */
export async function removeUnused(supabase: SupabaseClient, workflowId: string, kept: readonly string[]): Promise<number> {
  const bucket = supabase.storage.from(SOURCES);
  try {
    const files = dataOf(await bucket.list(workflowId, { limit: MAX_FILES }));
    if (files.length === 0) return 0;
    const before = await serverTime(supabase, `${workflowId}/${files[0]!.name}`) - YOUNG;
    const nodes = await selectAll<{ id: string; path: string | null }>(last =>
      supabase.from("workflow_nodes").select("id,path:node_data->upload->>path").eq("workflow_id", workflowId)
        .gt("id", last).order("id").limit(PAGE_SIZE));
    const runs = await selectAll<{ id: string; image: string | null }>(last =>
      supabase.from("runs").select("id,image:metadata->promptSpec->>previousImage").eq("subject_id", workflowId)
        .in("status", ["pending", "running"]).gt("id", last).order("id").limit(PAGE_SIZE));
    const used = new Set([...kept, ...nodes.map(({ path }) => path)]);
    const paths = files.filter(({ created_at }) => created_at && Date.parse(created_at) < before)
      .map(({ name }) => `${workflowId}/${name}`)
      .filter(path => !used.has(path) && !runs.some(({ image }) => image?.includes(path)));
    return paths.length > 0 ? dataOf(await bucket.remove(paths)).length : 0;
  } catch {
    throw new Refusal("No room was made: the server cannot be reached, or refuses.", "Try again later.");
  }
}

/** Returns the data of a response; throws where there is none. */
function dataOf<T>({ data, error }: { data: T | null; error: unknown }): T {
  if (error || data === null) throw error;
  return data;
}

/**
 * Returns the rows of all pages. `select` returns those behind an id, by id: rows that come and go meanwhile shift none of the
 * others, and a server that sends fewer rows than it was asked for has not come to the end.
 */
async function selectAll<Row extends { id: string }>(
  select: (last: string) => PromiseLike<{ data: Row[] | null; error: unknown }>,
): Promise<Row[]> {
  const rows: Row[] = [];
  for (;;) {
    const page = dataOf(await select(rows.at(-1)?.id ?? ""));
    if (page.length === 0) return rows;
    rows.push(...page);
  }
}

/**
 * Returns the server's time, in milliseconds since 1970: a computer's clock may be hours ahead. Storage signs an address until
 * `exp`, in seconds (RFC 7519), so many from its now. No page of another origin may read a `Date` header of Storage's.
 */
async function serverTime(supabase: SupabaseClient, path: string): Promise<number> {
  const { signedUrl } = dataOf(await supabase.storage.from(SOURCES).createSignedUrl(path, SIGNED_FOR));
  const claims = new URL(signedUrl).searchParams.get("token")!.split(".")[1]!.replaceAll("-", "+").replaceAll("_", "/");
  const { exp } = JSON.parse(atob(claims)) as { exp?: unknown };
  if (typeof exp !== "number") throw new Error("Storage's token does not say until when it is good.");
  return (exp - SIGNED_FOR) * 1_000;
}
