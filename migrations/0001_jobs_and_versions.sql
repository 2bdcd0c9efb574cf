-- Times are milliseconds since the Unix epoch.

CREATE TABLE jobs (
    id                TEXT PRIMARY KEY,
    task              TEXT NOT NULL,
    spec              TEXT NOT NULL CHECK (json_valid(spec)),
    state             TEXT NOT NULL CHECK (state IN ('queued', 'running', 'succeeded', 'failed', 'cancelled')),
    stage             TEXT,
    step              INTEGER NOT NULL DEFAULT 0,
    steps             INTEGER NOT NULL DEFAULT 0,
    loss              REAL,
    tokens_per_second REAL,
    eta_seconds       REAL,
    version           INTEGER,
    error             TEXT,
    created_at        INTEGER NOT NULL,
    started_at        INTEGER,
    finished_at       INTEGER,
    idempotency_key   TEXT UNIQUE,
    -- SHA-256 of the request that made the job, so that a key is not used for two requests.
    request_digest    TEXT NOT NULL,
    FOREIGN KEY (task, version) REFERENCES versions (task, version)
) STRICT;

CREATE INDEX jobs_by_state ON jobs (state, created_at);

CREATE TABLE versions (
    task       TEXT NOT NULL,
    version    INTEGER NOT NULL CHECK (version > 0),
    origin     TEXT NOT NULL CHECK (origin IN ('shipped', 'distilled', 'imported')),
    job        TEXT REFERENCES jobs (id),
    -- SHA-256 over the names and bytes of the folder's files.
    digest     TEXT NOT NULL,
    bytes      INTEGER NOT NULL,
    report     TEXT CHECK (json_valid(report)),
    created_at INTEGER NOT NULL,
    PRIMARY KEY (task, version)
) STRICT;

-- Every change of a live version, in order. A promotion remembers which promotion it replaced,
-- so that rolling back twice goes two steps back instead of to and fro.
CREATE TABLE changes (
    id       INTEGER PRIMARY KEY AUTOINCREMENT,
    task     TEXT NOT NULL,
    kind     TEXT NOT NULL CHECK (kind IN ('promote', 'rollback')),
    version  INTEGER NOT NULL,
    previous INTEGER,
    replaced INTEGER REFERENCES changes (id),
    actor    TEXT NOT NULL,
    reason   TEXT NOT NULL,
    at       INTEGER NOT NULL,
    FOREIGN KEY (task, version) REFERENCES versions (task, version)
) STRICT;

CREATE INDEX changes_by_task ON changes (task, id);

CREATE TABLE live (
    task      TEXT PRIMARY KEY,
    version   INTEGER NOT NULL,
    -- The promotion that is in force: a rollback brings an older one back into force.
    promotion INTEGER NOT NULL REFERENCES changes (id),
    FOREIGN KEY (task, version) REFERENCES versions (task, version)
) STRICT;
