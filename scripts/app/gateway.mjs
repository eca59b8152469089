// Stands for what a hosted project has before its Postgres: auth and rest by
// @supabase/lite, storage by the local server, behind one address.
import { serve } from "@hono/node-server";
import { App } from "@supabase/lite";
import { createPostgresConnection } from "@supabase/lite/postgres";

function open(databaseURL, jwtSecret) {
  const connection = createPostgresConnection({ url: databaseURL, postgresOptions: { max: 4, onnotice: () => {} } });
  const app = new App({
    connection,
    auth: { enabled: true, jwt_secret: jwtSecret, email: { enable_confirmations: false } },
    options: { server: { disableStudio: true } },
  });
  return { app, connection };
}

// authSchema gives an empty database the tables of auth, before our migrations
// refer to them.
export async function authSchema(databaseURL) {
  const { app, connection } = open(databaseURL, "not used here");
  await app.ensureSystemSchema();
  await connection.close();
}

// start listens on the loopback and returns the project's URL.
export async function start({ databaseURL, jwtSecret, storageURL }) {
  const { app, connection } = open(databaseURL, jwtSecret);
  // Lite grants everything to everybody when it first sees row level security.
  // Supabase does not, so that our own grants are what is tested: it is told
  // that it has looked already.
  if (connection.rlsState !== "unknown") throw new Error("lite keeps its state of row level security elsewhere now: its grants would hide ours");
  connection.rlsState = "active";

  const storage = (request) => {
    const url = new URL(request.url);
    const body = request.body ? { body: request.body, duplex: "half" } : {};
    return fetch(storageURL + url.pathname + url.search, { method: request.method, headers: request.headers, redirect: "manual", ...body });
  };
  const fetchAny = (request) => (new URL(request.url).pathname.startsWith("/storage/v1/") ? storage(request) : app.fetch(request));
  const server = await new Promise((resolve) => {
    const s = serve({ fetch: fetchAny, hostname: "127.0.0.1", port: 0 }, () => resolve(s));
  });
  return {
    url: `http://127.0.0.1:${server.address().port}`,
    stop: async () => {
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
      await connection.close();
    },
  };
}
