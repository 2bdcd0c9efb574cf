-- How a task's adapter meets the student, where an administrator has said so.
CREATE TABLE task_modes (
    task TEXT PRIMARY KEY,
    mode TEXT NOT NULL CHECK (mode IN ('hot', 'merged'))
) STRICT;
