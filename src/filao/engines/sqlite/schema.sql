-- The tables of a Filao file; the prefix keeps them apart from the user's own tables in the same file.
-- Times are integer milliseconds since 1970, by the clock of the machine.
--
-- A claim must cost the same whatever lies in the queue, so every state has an index of its own, holding only the rows
-- in that state: a claim never walks past messages that are leased, delayed, blocked or dead.
--
-- Columns that change while a message lives (state, at, token, attempts) take the same number of bytes before and after
-- (states start at 2, times are 6 bytes, tokens 8, attempts until the second), so that SQLite overwrites them in place:
-- a lease on a message with a large body writes a page, not the body.

CREATE TABLE filao_meta (
  name  TEXT PRIMARY KEY,
  value ANY NOT NULL
) STRICT, WITHOUT ROWID;
-- 'file': random, the first part of every message id, so that ids are unique across files
-- 'version': of this schema (not PRAGMA user_version: that one is the user's)
-- 'last': the last message number given, or up to a hundred more. It only grows, even when the last message is deleted:
--         a number that came back would stand before older ones and break the order

CREATE TABLE filao_queue (
  id         INTEGER PRIMARY KEY,
  name       TEXT    NOT NULL UNIQUE,
  rules      TEXT    NOT NULL,            -- JSON, see filao.queue.rules_to_json
  paused     INTEGER NOT NULL DEFAULT 0,  -- 1: nothing is delivered
  -- the counters, kept in the transaction that changes what they count
  ready      INTEGER NOT NULL DEFAULT 0,
  delayed    INTEGER NOT NULL DEFAULT 0,
  leased     INTEGER NOT NULL DEFAULT 0,
  blocked    INTEGER NOT NULL DEFAULT 0,
  dead       INTEGER NOT NULL DEFAULT 0,
  sent       INTEGER NOT NULL DEFAULT 0,
  duplicates INTEGER NOT NULL DEFAULT 0,
  refused    INTEGER NOT NULL DEFAULT 0,
  received   INTEGER NOT NULL DEFAULT 0,
  acked      INTEGER NOT NULL DEFAULT 0,
  late       INTEGER NOT NULL DEFAULT 0,
  nacked     INTEGER NOT NULL DEFAULT 0,
  released   INTEGER NOT NULL DEFAULT 0,
  lost       INTEGER NOT NULL DEFAULT 0,
  died       INTEGER NOT NULL DEFAULT 0,
  dropped    INTEGER NOT NULL DEFAULT 0,
  redriven   INTEGER NOT NULL DEFAULT 0,
  purged     INTEGER NOT NULL DEFAULT 0,
  cancelled  INTEGER NOT NULL DEFAULT 0
) STRICT;

CREATE TABLE filao_message (
  id         INTEGER PRIMARY KEY,  -- its number and its place: the order of sending
  queue      INTEGER NOT NULL,     -- queue.id
  state      INTEGER NOT NULL,     -- 2 ready, 3 delayed, 4 leased, 5 blocked, 6 dead
  priority   INTEGER NOT NULL,     -- higher goes first
  at         INTEGER NOT NULL,     -- delayed, or blocked with a delay: due; leased: the lease's end; else: since when
  token      INTEGER NOT NULL,     -- of the last lease while nobody settled it; else -2^62, which no lease has
  attempts   INTEGER NOT NULL,     -- deliveries less releases
  failures   INTEGER NOT NULL,     -- failed attempts ever put into its history
  sent_at    INTEGER NOT NULL,
  expires_at INTEGER,              -- the end of its time to live
  grp        TEXT,                 -- its group ("group" is a word of SQL)
  dedup_key  TEXT,
  message_id TEXT,                 -- the identity its sender gave; without one it is meta.file and the number
  headers    TEXT,                 -- JSON
  reason     TEXT,                 -- why it is dead
  kind       INTEGER NOT NULL,     -- of the content: 0 JSON, 1 bytes
  content    BLOB    NOT NULL      -- last, so that the short columns are read without the long one
) STRICT;

CREATE INDEX filao_ready    ON filao_message (queue, priority DESC, id) WHERE state = 2;
CREATE INDEX filao_delayed  ON filao_message (queue, at)                WHERE state = 3;
CREATE INDEX filao_leased   ON filao_message (queue, at)                WHERE state = 4;
CREATE INDEX filao_dead     ON filao_message (queue, id)                WHERE state = 6;
CREATE INDEX filao_grouped  ON filao_message (queue, state, grp, id)    WHERE grp IS NOT NULL;
CREATE INDEX filao_expiring ON filao_message (queue, expires_at) WHERE expires_at IS NOT NULL AND state IN (2, 3, 5);

CREATE INDEX filao_named    ON filao_message (queue, message_id)        WHERE message_id IS NOT NULL;

CREATE TABLE filao_failure (
  id       INTEGER PRIMARY KEY,
  message  INTEGER NOT NULL,  -- message.id
  attempt  INTEGER NOT NULL,
  at       INTEGER NOT NULL,
  outcome  TEXT    NOT NULL,  -- see filao.message.Failure
  error    TEXT    NOT NULL,
  consumer TEXT    NOT NULL   -- host and process
) STRICT;
CREATE INDEX filao_failures ON filao_failure (message, id);

CREATE TABLE filao_dedup (
  queue   INTEGER NOT NULL,
  kind    INTEGER NOT NULL,   -- 0: a dedup_key; 1: a message_id
  key     TEXT    NOT NULL,
  message TEXT    NOT NULL,   -- the id of the message that came first
  until   INTEGER,            -- remembered so long; NULL: while the message is pending
  PRIMARY KEY (queue, kind, key)
) STRICT, WITHOUT ROWID;
CREATE INDEX filao_dedup_until ON filao_dedup (until) WHERE until IS NOT NULL;

CREATE TABLE filao_halted (          -- groups that wait for an operator
  queue INTEGER NOT NULL,
  grp   TEXT    NOT NULL,
  PRIMARY KEY (queue, grp)
) STRICT, WITHOUT ROWID;

CREATE TABLE filao_process (         -- every process that receives here; tokens carry its id, so the id is never reused
  id         INTEGER PRIMARY KEY AUTOINCREMENT,
  bell       TEXT    NOT NULL, -- the name of its FIFO beside the file; '' where there is none
  name       TEXT    NOT NULL, -- host and process, for people
  started_at INTEGER NOT NULL
) STRICT;

CREATE TABLE filao_waiting (         -- processes to call when the queue gets something
  queue     INTEGER NOT NULL,
  since     INTEGER NOT NULL,  -- a count that grows: those that have waited longest are called first
  process   INTEGER NOT NULL,
  wants     INTEGER NOT NULL,  -- how many messages it waits for
  called_at INTEGER NOT NULL,  -- when it was called for as many; 0: it was not
  PRIMARY KEY (queue, process)
) STRICT, WITHOUT ROWID;
