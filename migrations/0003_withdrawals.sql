-- Tasks that were taken out of service.
CREATE TABLE withdrawals (
    task    TEXT NOT NULL,
    -- Live until then.
    version INTEGER NOT NULL,
    -- The last change of the task before it.
    after   INTEGER NOT NULL REFERENCES changes (id),
    actor   TEXT NOT NULL,
    reason  TEXT NOT NULL,
    at      INTEGER NOT NULL,
    FOREIGN KEY (task, version) REFERENCES versions (task, version)
) STRICT;

CREATE INDEX withdrawals_by_task ON withdrawals (task);
