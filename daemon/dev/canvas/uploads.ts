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
 * Removes the pictures of a workflow that no node shows, and no run in line starts from; those of the last hour stay, as their
 * nodes may be on their way. Returns how many there were; throws a `Refusal` where the server refuses, or cannot be reached.
 */
export async function removeUnused(supabase: SupabaseClient, workflowId: string): Promise<number> {
  const bucket = supabase.storage.from(SOURCES);
  const { data: files, error } = await bucket.list(workflowId, { limit: MAX_FILES });
  const used = new Set<string>();
  let refused = error !== null;
  for (let from = 0, full = true; full && !refused; from += PAGE_SIZE) {
    const { data, error } = await supabase.from("workflow_nodes").select("path:node_data->upload->>path")
      .eq("workflow_id", workflowId).order("id").range(from, from + PAGE_SIZE - 1).returns<{ path: string | null }[]>();
    data?.forEach(({ path }) => path && used.add(path));
    full = data?.length === PAGE_SIZE;
    refused = error !== null;
  }
  const { data: runs, error: unknown } = await supabase.from("runs").select("image:metadata->promptSpec->>previousImage")
    .eq("subject_id", workflowId).in("status", ["pending", "running"]).returns<{ image: string | null }[]>();
  const paths = (files ?? []).filter(({ created_at }) => created_at && Date.parse(created_at) < Date.now() - YOUNG)
    .map(({ name }) => `${workflowId}/${name}`)
    .filter(path => !used.has(path) && !runs?.some(({ image }) => image?.endsWith(path)));
  const removed = refused || unknown ? undefined : paths.length > 0 ? await bucket.remove(paths) : { data: [], error: null };
  if (!removed?.data || removed.error) throw new Refusal("No room was made: the server cannot be reached, or refuses.", "Try again later.");
  return removed.data.length;
}
