// The server's API, as far as the page needs it.

const TOKEN = "kdlora-token";

/** A request that failed, with the sentence that the server gave. */
export class ApiError extends Error {
  constructor(status, title, detail) {
    super(detail);
    this.status = status;
    this.title = title;
  }

  /** Whether a token, or another one, would help. */
  get needsToken() {
    return this.status === 401 || this.status === 403;
  }
}

// The token lives as long as the tab, and is sent to this server only.
export const token = {
  get: () => sessionStorage.getItem(TOKEN),
  set(value) {
    if (value) sessionStorage.setItem(TOKEN, value);
    else sessionStorage.removeItem(TOKEN);
  },
};

/** An answer that was a success; throws `ApiError` otherwise. */
export async function request(path, options = {}) {
  const headers = new Headers(options.headers);
  if (token.get()) headers.set("Authorization", `Bearer ${token.get()}`);
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials: "omit", cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "No answer", "The server can't be reached.");
  }
  if (response.ok) return response;
  const problem = await response.json().catch(() => ({}));
  const title = problem.title ?? response.statusText;
  throw new ApiError(response.status, title, problem.detail ?? `${response.status} ${title}`);
}

export async function getJson(path, options) {
  return (await request(path, options)).json();
}

export async function postJson(path, body, options = {}) {
  const headers = { "Content-Type": "application/json" };
  const post = { ...options, method: "POST", headers, body: JSON.stringify(body) };
  return getJson(path, post);
}

const at = encodeURIComponent;

export const api = {
  /** Tasks by name, 50 at a time, and the name to go on behind, if there are more. */
  tasks: (after) => getJson(`/v1/tasks?limit=50${after ? `&after=${at(after)}` : ""}`),
  task: (task) => getJson(`/v1/tasks/${at(task)}`),
  /** The answer and the times of `Server-Timing`, in milliseconds. */
  async classify(task, inputs, signal) {
    const response = await request(`/v1/classify/${at(task)}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ inputs }),
      signal,
    });
    return { ...(await response.json()), timings: timings(response.headers.get("Server-Timing")) };
  },
  askTeacher: (task, inputs, signal) =>
    postJson(`/admin/tasks/${at(task)}/teacher`, { inputs }, { signal }),
  teachers: () => getJson("/admin/teachers"),
  versions: (task) => getJson(`/admin/tasks/${at(task)}/versions`),
  compare: (task, one, other) => getJson(`/v1/tasks/${at(task)}/versions/${one}...${other}`),
  promote: (task, version, reason) =>
    postJson(`/admin/tasks/${at(task)}/promote`, { version, ...(reason ? { reason } : {}) }),
  rollback: (task, reason) =>
    getJson(`/admin/tasks/${at(task)}/rollback${reason ? `?reason=${at(reason)}` : ""}`, {
      method: "POST",
    }),
  withdraw: (task, reason) =>
    request(`/admin/tasks/${at(task)}${reason ? `?reason=${at(reason)}` : ""}`, { method: "DELETE" }),
  distil: (form) => getJson("/admin/distill", { method: "POST", body: form }),
  jobs: async () => (await getJson("/admin/jobs?limit=20")).jobs,
  job: (id) => getJson(`/admin/jobs/${at(id)}`),
  cancel: (id) => getJson(`/admin/jobs/${at(id)}`, { method: "DELETE" }),
};

function timings(header) {
  const times = {};
  for (const part of (header ?? "").split(",")) {
    const match = /^\s*([\w-]+)\s*;\s*dur=([\d.]+)/.exec(part);
    if (match) times[match[1]] = Number(match[2]);
  }
  return times;
}
