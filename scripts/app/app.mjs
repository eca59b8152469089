// Does with supabase-js what the app's routes do, against a database with our
// migrations and a dispatcher and an agent at work; then tries as somebody
// else. It stops at the first thing that is not as the app expects it.
//
//   node app.mjs schema   give an empty database the tables of auth
//   node app.mjs          do it; a line for each thing done
//
// Settings: DATABASE_URL; for the second also STORAGE_URL, JWT_SECRET,
// ANON_KEY, SERVICE_KEY.
import assert from "node:assert/strict";
import { createHash, randomUUID } from "node:crypto";
import { setTimeout as sleep } from "node:timers/promises";
import { createClient } from "@supabase/supabase-js";
import { authSchema, start } from "./gateway.mjs";

const env = process.env;
const began = Date.now();
const say = (what) => console.log(`${((Date.now() - began) / 1000).toFixed(1).padStart(5)} s  ${what}`);

// must returns the data of an answer, or stops.
async function must(what, answer) {
  const { data, error } = await answer;
  if (error) throw new Error(`${what}: ${error.code ?? error.statusCode ?? ""} ${error.message}`);
  return data;
}

// refused expects an answer with an error, and returns it.
async function refused(what, answer, code) {
  const { data, error } = await answer;
  if (!error) throw new Error(`${what} was not refused: ${JSON.stringify(data)}`);
  if (code) assert.equal(error.code, code, `${what}: ${error.message}`);
  return error;
}

// nothing expects an answer without rows: they are hidden, or it is forbidden.
async function nothing(what, answer) {
  const { data, error } = await answer;
  if (error) return assert.equal(error.code, "42501", `${what}: ${error.message}`);
  assert.deepEqual(data, [], `${what} touched rows`);
}

async function eventually(what, seconds, look) {
  const deadline = Date.now() + seconds * 1000;
  for (;;) {
    const found = await look();
    if (found) return found;
    if (Date.now() > deadline) throw new Error(`${what} did not happen in ${seconds} s`);
    await sleep(200);
  }
}

// --- The app's routes -------------------------------------------------------

const options = { auth: { persistSession: false, autoRefreshToken: false } };

// POST /api/datasets: the row as the user, the upload URL as the service.
async function createDataset({ db, user }, admin, fileName, size) {
  const id = randomUUID();
  const storagePath = `${user.id}/${id}/${fileName}`;
  const row = await must("insert the data set", db.from("datasets").insert({
    id, user_id: user.id, name: "workshop talks", description: null, format: "brightrun_lora_v4", status: "uploading",
    storage_bucket: "lora-datasets", storage_path: storagePath, file_name: fileName, file_size: size,
  }).select().single());
  const upload = await must("sign the upload", admin.storage.from("lora-datasets").createSignedUploadUrl(storagePath));
  return { row, upload };
}

// POST /api/datasets/{id}/confirm
const confirmDataset = ({ db }, id) =>
  must("confirm the upload", db.from("datasets").update({ status: "validating" }).eq("id", id).select().single());

// POST /api/jobs
const jobRow = ({ user }, datasetID) => ({
  user_id: user.id, dataset_id: datasetID, preset_id: "balanced",
  hyperparameters: { learning_rate: 5e-5, batch_size: 4, epochs: 3, rank: 16, alpha: 32, dropout: 0.1 },
  gpu_config: { type: "A100-80GB", count: 1 },
  status: "queued", current_stage: "queued", progress: 0, current_epoch: 0, total_epochs: 3, current_step: 0, total_steps: 120,
  current_metrics: {}, current_cost: 0, estimated_total_cost: 2.5,
});
const createJob = (who, datasetID) =>
  must("insert the job", who.db.from("training_jobs").insert(jobRow(who, datasetID)).select().single());

// GET /api/jobs/{id}: what the job's page polls.
const readJob = ({ db }, id) =>
  must("read the job", db.from("training_jobs").select("*, dataset:datasets(id, name, total_training_pairs)").eq("id", id).single());

// POST /api/jobs/{id}/cancel: reads the row, then updates it blindly.
async function cancelJob({ db, user }, id) {
  const job = await must("read the job", db.from("training_jobs").select("*").eq("id", id).eq("user_id", user.id).single());
  if (!["queued", "initializing", "running"].includes(job.status)) throw new Error(`cannot cancel a job that is ${job.status}`);
  const now = new Date().toISOString();
  await must("cancel the job", db.from("training_jobs").update({ status: "cancelled", completed_at: now, final_cost: job.current_cost }).eq("id", id));
  await must("notify", db.from("notifications").insert({
    user_id: user.id, type: "job_cancelled", title: "Training cancelled", message: "You cancelled the job.", priority: "low", action_url: `/training/jobs/${id}`, metadata: { job_id: id },
  }));
}

// GET /api/models/{id}/download: one signed URL for each file.
async function downloadModel(admin, artifact) {
  const files = {};
  for (const [name, path] of Object.entries(artifact.artifacts)) {
    files[name] = (await must(`sign ${path}`, admin.storage.from("lora-models").createSignedUrl(path, 3600, { download: name }))).signedUrl;
  }
  return files;
}

// --- What happens -----------------------------------------------------------

async function signUp(url, email) {
  const db = createClient(url, env.ANON_KEY, options);
  const { user, session } = await must("sign up", db.auth.signUp({ email, password: "correct-horse-battery-9" }));
  assert.ok(session, "signing up gave no session");
  return { db, user };
}

async function train(alice, admin) {
  const talks = Array.from({ length: 20 }, (_, i) => ({
    messages: [{ role: "user", content: `My chain slips in gear ${i + 1}.` }, { role: "assistant", content: `Let us look at the wear of sprocket ${i + 1} first.` }],
  }));
  const file = new Blob(talks.map((t) => JSON.stringify(t) + "\n"), { type: "application/jsonl" });
  const { row, upload } = await createDataset(alice, admin, "talks.jsonl", file.size);
  await must("upload", alice.db.storage.from("lora-datasets").uploadToSignedUrl(upload.path, upload.token, file, { contentType: "application/jsonl" }));
  const confirmed = await confirmDataset(alice, row.id);
  assert.equal(confirmed.status, "validating");
  say(`uploaded and confirmed ${confirmed.id}`);
  const ready = await eventually("validation", 60, async () => {
    const d = await must("read the data set", alice.db.from("datasets").select("*").eq("id", row.id).single());
    assert.notEqual(d.status, "error", d.error_message);
    return d.status === "ready" && d;
  });
  assert.ok(ready.training_ready && ready.validated_at && ready.total_training_pairs > 0 && Number(ready.total_tokens) > 0);
  assert.equal(ready.sample_data.length, 3);
  say("the data set is ready");

  const job = await createJob(alice, row.id);
  const seen = new Set();
  const done = await eventually("the end of the job", 120, async () => {
    const j = await readJob(alice, job.id);
    assert.equal(j.dataset.id, row.id);
    seen.add(j.status);
    assert.ok(!["failed", "cancelled"].includes(j.status), `the job is ${j.status}: ${j.error_message}`);
    return j.status === "completed" && j;
  });
  assert.equal(Number(done.progress), 100); // numerics are numbers to PostgREST, strings to lite
  assert.ok(done.artifact_id && done.started_at && done.completed_at);
  assert.ok(seen.has("queued") || seen.has("initializing") || seen.has("running"), "the row was never seen before its end");
  say(`trained ${job.id}: ${[...seen].join(", ")}`);

  const points = await must("read the metrics", alice.db.from("metrics_points").select("*").eq("job_id", job.id).order("timestamp").limit(100));
  assert.equal(points.length, Number(done.total_steps), "metrics rows");
  assert.ok(points.every((p) => Number.isFinite(Number(p.training_loss)) && Number(p.learning_rate) > 0));
  const artifact = await must("read the artifact", alice.db.from("model_artifacts").select("*").eq("job_id", job.id).single());
  assert.equal(artifact.id, done.artifact_id);
  assert.ok(artifact.quality_metrics.overall_score >= 1 && artifact.training_summary.total_steps > 0 && artifact.configuration.preset_id === "balanced");
  const costs = await must("read the costs", alice.db.from("cost_records").select("*").eq("job_id", job.id));
  assert.equal(costs.length, 1);
  assert.equal(Number(costs[0].amount), Number(done.final_cost));
  const notes = await must("read the notifications", alice.db.from("notifications").select("id, type").eq("read", false).order("created_at"));
  for (const type of ["dataset_ready", "job_started", "job_completed", "artifact_ready"]) assert.equal(notes.filter((n) => n.type === type).length, 1, type);
  await must("mark as read", alice.db.from("notifications").update({ read: true }).eq("id", notes[0].id).select().single());
  await must("read the checkpoints", alice.db.from("checkpoints").select("*").eq("job_id", job.id));
  const lines = await must("read the log", alice.db.from("job_logs").select("*").eq("job_id", job.id).order("timestamp"));
  assert.ok(lines.length > 0, "no log lines");
  say(`read ${points.length} points, ${costs.length} cost record, ${notes.length} notifications, ${lines.length} lines`);

  const urls = await downloadModel(admin, artifact);
  const names = Object.keys(urls);
  assert.ok(names.includes("adapter_model.safetensors"), names.join(" "));
  for (const name of names) {
    const answer = await fetch(urls[name]);
    assert.equal(answer.status, 200, name);
    const digest = createHash("sha256").update(Buffer.from(await answer.arrayBuffer())).digest("hex");
    assert.equal(digest, artifact.training_summary.files.find((f) => f.name === name).sha256, name);
  }
  say(`downloaded ${names.length} files by signed URL`);
  return { dataset: row, job: done, artifact, note: notes[0].id };
}

async function cancel(alice, datasetID) {
  const job = await createJob(alice, datasetID);
  await eventually("training", 60, async () => (await readJob(alice, job.id)).status === "running");
  await cancelJob(alice, job.id);
  await eventually("the settlement", 30, async () => {
    const j = await readJob(alice, job.id);
    assert.equal(j.status, "cancelled");
    return j.final_cost !== null && j;
  });
  // A second press, and one that read the row before its end: nothing changes.
  await refused("cancelling twice", cancelJob(alice, job.id).then((data) => ({ data }), (error) => ({ error })));
  await nothing("a late cancel", alice.db.from("training_jobs").update({ status: "cancelled", completed_at: new Date().toISOString() }).eq("id", job.id).select());
  say("cancelled a running job");
}

// Nothing that a user says about where a job stands is believed.
async function forge(alice, datasetID) {
  const forged = {
    status: "completed", current_stage: "done", progress: 100, current_epoch: 3, current_step: 120, current_metrics: { training_loss: 0 },
    started_at: "2020-01-01T00:00:00Z", completed_at: "2020-01-01T00:00:00Z", estimated_completion_at: "2020-01-01T00:00:00Z",
    current_cost: 99, final_cost: 0, error_message: "x", error_stack: "x", retry_count: 7, external_job_id: "x", queued_at: "2020-01-01T00:00:00Z",
  };
  const row = await must("insert a forged job", alice.db.from("training_jobs").insert({ ...jobRow(alice, datasetID), ...forged }).select().single());
  assert.equal(row.status, "queued");
  for (const key of ["progress", "current_epoch", "current_step", "current_cost", "retry_count"]) assert.equal(Number(row[key]), 0, key);
  for (const key of ["started_at", "completed_at", "estimated_completion_at", "final_cost", "error_message", "error_stack", "external_job_id"]) assert.equal(row[key], null, key);
  assert.deepEqual(row.current_metrics, {});
  assert.ok(Date.now() - new Date(row.queued_at) < 60_000, "queued_at");
  // One more column than the app's cancel has, and the update is refused whole.
  for (const change of [{ progress: 50 }, { current_cost: 0 }, { hyperparameters: {} }, { user_id: randomUUID() }]) {
    await refused(`update ${Object.keys(change)}`, alice.db.from("training_jobs").update(change).eq("id", row.id), "42501");
  }
  await refused("completing", alice.db.from("training_jobs").update({ status: "completed" }).eq("id", row.id), "42501");
  await refused("deleting", alice.db.from("training_jobs").delete().eq("id", row.id), "42501");
  for (const [table, values] of Object.entries({
    metrics_points: { job_id: row.id, epoch: 1, step: 1, training_loss: 1, learning_rate: 1 },
    cost_records: { user_id: alice.user.id, job_id: row.id, cost_type: "compute", amount: -5, billing_period: "2026-11-01" },
    model_artifacts: { user_id: alice.user.id, job_id: row.id, dataset_id: datasetID, name: "x" },
  })) {
    await refused(`insert into ${table}`, alice.db.from(table).insert(values), "42501");
  }
  await cancelJob(alice, row.id);
  say("forged columns were forced");
}

// Somebody else: signed in or not, by the database and by Storage.
async function pry(who, name, hers) {
  const { db } = who;
  const owned = { id: hers.dataset.user_id };
  const reads = {
    datasets: ["id", hers.dataset.id], training_jobs: ["id", hers.job.id], model_artifacts: ["id", hers.artifact.id], metrics_points: ["job_id", hers.job.id],
    cost_records: ["job_id", hers.job.id], notifications: ["user_id", owned.id], checkpoints: ["job_id", hers.job.id], job_logs: ["job_id", hers.job.id],
  };
  const changes = { datasets: { name: "x" }, training_jobs: { status: "cancelled" }, model_artifacts: { name: "x" }, metrics_points: { step: 9 }, cost_records: { amount: 0 }, notifications: { read: false }, checkpoints: { step: 9 }, job_logs: { level: "x" } };
  for (const [table, [column, value]] of Object.entries(reads)) {
    await nothing(`${name} selects ${table}`, db.from(table).select("*").eq(column, value));
    await nothing(`${name} selects all ${table}`, db.from(table).select("*"));
    await nothing(`${name} updates ${table}`, db.from(table).update(changes[table]).eq(column, value).select());
    await nothing(`${name} deletes ${table}`, db.from(table).delete().eq(column, value).select());
  }
  await refused(`${name} reads the control state`, db.schema("lorayard").from("jobs").select("*"));
  const [file] = Object.values(hers.artifact.artifacts);
  for (const [bucket, key] of [["lora-models", file], ["lora-datasets", hers.dataset.storage_path]]) {
    const store = db.storage.from(bucket);
    const folder = key.slice(0, key.lastIndexOf("/"));
    const listed = await store.list(folder);
    assert.deepEqual(listed.data ?? [], [], `${name} lists ${bucket}`);
    await refused(`${name} downloads ${key}`, store.download(key));
    await refused(`${name} signs ${key}`, store.createSignedUrl(key, 60));
    await refused(`${name} overwrites ${key}`, store.upload(key, new Blob(["x"]), { upsert: true }));
    await refused(`${name} writes beside ${key}`, store.upload(`${folder}/x`, new Blob(["x"])));
    await refused(`${name} signs an upload beside ${key}`, store.createSignedUploadUrl(`${folder}/x`));
    const removed = await store.remove([key]);
    assert.deepEqual(removed.data ?? [], [], `${name} removes ${key}`);
  }
}

async function main() {
  const gateway = await start({ databaseURL: env.DATABASE_URL, jwtSecret: env.JWT_SECRET, storageURL: env.STORAGE_URL });
  try {
    const admin = createClient(gateway.url, env.SERVICE_KEY, options);
    const alice = await signUp(gateway.url, "alice@example.com");
    say("signed up");
    const hers = await train(alice, admin);
    await cancel(alice, hers.dataset.id);
    await forge(alice, hers.dataset.id);

    const bob = await signUp(gateway.url, "bob@example.com");
    await pry(bob, "bob", hers);
    const foreign = await refused("a job on another's data set", bob.db.from("training_jobs").insert(jobRow(bob, hers.dataset.id)), "42501");
    assert.match(foreign.message, /not yours/);
    await refused("a job in another's name", bob.db.from("training_jobs").insert({ ...jobRow(bob, hers.dataset.id), user_id: alice.user.id }), "42501");
    await refused("a data set that points at another's file", bob.db.from("datasets").insert({ user_id: bob.user.id, name: "x", file_name: "x", storage_path: hers.dataset.storage_path }), "42501");
    await refused("a notification for another", bob.db.from("notifications").insert({ user_id: alice.user.id, type: "job_completed", title: "x", message: "x" }), "42501");
    say("another user sees and changes nothing");
    await pry({ db: createClient(gateway.url, env.ANON_KEY, options) }, "anon", hers);
    say("nor does somebody who is not signed in");

    // All is as it was, and she may read her own by her own key.
    const [name, path] = Object.entries(hers.artifact.artifacts)[0];
    assert.ok((await must(`download ${name}`, alice.db.storage.from("lora-models").download(path))).size > 0);
    const again = await readJob(alice, hers.job.id);
    assert.deepEqual({ ...again, dataset: null }, { ...hers.job, dataset: null });
    await must("sign out", alice.db.auth.signOut().then(({ error }) => ({ error })));
    say("done");
  } finally {
    await gateway.stop();
  }
}

await (process.argv[2] === "schema" ? authSchema(env.DATABASE_URL) : main());
