-- The student that a version was trained on: the SHA-256 of what it computes with, and its name.
-- Without a digest it is not known whether the version belongs to the student that serves.
ALTER TABLE versions ADD COLUMN student_digest TEXT;
ALTER TABLE versions ADD COLUMN student_name TEXT;

-- SHA-256 of each file of the version's folder, by its path in the folder. Absent where the folder
-- was not what it had been when the sums were first taken.
ALTER TABLE versions ADD COLUMN files TEXT CHECK (json_valid(files));

-- What the folder remembers of how it is served: 'student' is the encoder's name or folder.
CREATE TABLE settings (
    name  TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;
