-- The tables of Filao in a PostgreSQL database, in a schema of their own. Times are integer milliseconds since 1970, by
-- the clock of the server, less its jumps.
--
-- As on SQLite, every state has an index of its own, so that a claim costs the same whatever lies in the queue.

CREATE TABLE filao.meta (
  name  text PRIMARY KEY,
  value text NOT NULL
);
-- 'database': random; also the first part of the ids of messages that were sent before version 2 'version':  of this
-- schema, see schema.py 'clock':    {the sum of the jumps of the server's wall clock, by how much it was ahead of the
-- queues' time after the last, when that was by the wall clock}, see filao.note_jump; there is none before the first

CREATE TYPE filao.state AS ENUM ('ready', 'delayed', 'leased', 'blocked', 'dead');

-- The numbers of queues and of processes are drawn at random: a process that knew one before a failover, a restore or a
-- schema that was made anew must not meet it under another name afterwards.
CREATE TABLE filao.queue (
  id     integer PRIMARY KEY DEFAULT floor(random() * 2147483646.0::float8)::integer + 1,
  name   text    NOT NULL UNIQUE,
  rules  jsonb   NOT NULL,               -- see filao.queue.rules_to_json; below, what the functions read of them
  paused boolean NOT NULL DEFAULT false, -- nothing is delivered
  lease        bigint  NOT NULL GENERATED ALWAYS AS ((rules ->> 'lease')::float8 * 1000) STORED,
  max_attempts integer NOT NULL GENERATED ALWAYS AS ((rules ->> 'max_attempts')::integer) STORED,
  first_delay  float8  NOT NULL GENERATED ALWAYS AS ((rules -> 'backoff' ->> 'first')::float8 * 1000) STORED,
  factor       float8  NOT NULL GENERATED ALWAYS AS ((rules -> 'backoff' ->> 'factor')::float8) STORED,
  ceiling      float8  NOT NULL GENERATED ALWAYS AS ((rules -> 'backoff' ->> 'ceiling')::float8 * 1000) STORED,
  jitter       float8  NOT NULL GENERATED ALWAYS AS ((rules -> 'backoff' ->> 'jitter')::float8) STORED,
  ttl          bigint           GENERATED ALWAYS AS ((rules ->> 'ttl')::float8 * 1000) STORED,
  drops_old    boolean NOT NULL GENERATED ALWAYS AS (rules ->> 'on_expiry' = 'drop') STORED,
  dedup_window bigint  NOT NULL GENERATED ALWAYS AS ((rules ->> 'dedup_window')::float8 * 1000) STORED,
  max_length   bigint           GENERATED ALWAYS AS ((rules ->> 'max_length')::bigint) STORED,
  drops_oldest boolean NOT NULL GENERATED ALWAYS AS (rules ->> 'overflow' = 'drop_oldest') STORED,
  skips_failed boolean NOT NULL GENERATED ALWAYS AS (rules ->> 'group_failure' = 'skip') STORED,
  halts_dead   boolean NOT NULL GENERATED ALWAYS AS (rules ->> 'group_dead' = 'halt') STORED,
  body_max     integer NOT NULL GENERATED ALWAYS AS ((rules ->> 'body_max')::integer) STORED,
  kept_for     bigint           GENERATED ALWAYS AS (
    CASE WHEN (rules ->> 'history')::boolean THEN ((rules ->> 'history_window')::float8 * 1000)::bigint END
  ) STORED  -- how long events are kept; NULL: there are none
);

-- Numbers are given before the commit, so of two messages that are sent at the same time either may come first. What is
-- sent after another send has returned has the higher number: the sequence must not be cached by the sessions.
CREATE SEQUENCE filao.number CACHE 1;

CREATE TABLE filao.message (
  id         bigint      PRIMARY KEY,    -- its number and its place: the order of sending
  queue      integer     NOT NULL,
  state      filao.state NOT NULL,
  kind       smallint    NOT NULL,       -- of the content: 0 JSON, 1 bytes
  priority   integer     NOT NULL,       -- higher goes first
  attempts   integer     NOT NULL DEFAULT 0,  -- deliveries less releases
  failures   integer     NOT NULL DEFAULT 0,  -- failed attempts ever put into its history
  at         bigint      NOT NULL,       -- delayed, or blocked with a delay: due; leased: the end; else: since when
  token      bigint      NOT NULL DEFAULT 0,  -- of the last lease while nobody settled it; else 0, which no lease has
  sent_at    bigint      NOT NULL,
  expires_at bigint,                     -- the end of its time to live
  grp        text,                       -- its group
  dedup_key  text,
  message_id text,                       -- the identity its sender gave; without one it is the salt and the number
  headers    text,                       -- JSON
  reason     text,                       -- why it is dead
  content    bytea       NOT NULL,
  salt       bigint,                     -- the first part of its id; NULL: meta.database, as before version 2
  -- since which transaction it waits, or is leased for a short time; see seen.sql
  moved_in   xid8 DEFAULT pg_current_xact_id()
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000,
        autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 100000,
        autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 100000,
        autovacuum_vacuum_cost_delay = 0);
-- A queue's table changes wholly every few minutes, so it is vacuumed after a number of changes, not after a share of
-- it.

CREATE INDEX message_ready    ON filao.message (queue, (-priority), id) WHERE state = 'ready';
CREATE INDEX message_moved    ON filao.message (queue, moved_in)          WHERE moved_in IS NOT NULL;
CREATE INDEX message_delayed  ON filao.message (queue, at)                WHERE state = 'delayed';
CREATE INDEX message_leased   ON filao.message (queue, at)                WHERE state = 'leased';
CREATE INDEX message_dead     ON filao.message (queue, id)                WHERE state = 'dead';
CREATE INDEX message_blocked  ON filao.message (queue, id)                WHERE state = 'blocked';
CREATE INDEX message_grouped  ON filao.message (queue, grp, state, id)    WHERE grp IS NOT NULL;
CREATE INDEX message_expiring ON filao.message (queue, expires_at)
  WHERE expires_at IS NOT NULL AND state IN ('ready', 'delayed', 'blocked');
CREATE INDEX message_named    ON filao.message (queue, message_id)        WHERE message_id IS NOT NULL;

CREATE TYPE filao.seen AS ( -- what a session has seen of a queue: see seen.sql
  snapshot   pg_snapshot,
  own        xid8,       -- the transaction that looked, if it had a number
  priorities integer[],  -- of which something may be ready, the highest first
  floors     bigint[],   -- the lowest id that may be ready, of each of them
  below      integer,    -- priorities lower than this have not been looked at; NULL: all have
  delayed    bigint,     -- the lowest `at` of a delayed message; NULL: there is none
  leased     bigint,     -- the lowest `at` of a lease that was seen; NULL: there was none
  expiring   bigint,     -- the lowest `expires_at` of one that waits; NULL: there is none
  looked_at  bigint,     -- when
  blocked    bigint,     -- the lowest id that may be blocked; NULL: there is none
  noted      xid8        -- the lowest `noted_in` of a group to be arranged; NULL: there is none
);

CREATE TABLE filao.failure (
  id       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  message  bigint  NOT NULL,
  attempt  integer NOT NULL,
  at       bigint  NOT NULL,
  outcome  text    NOT NULL,   -- see filao.engine.Failure
  error    text    NOT NULL,
  consumer text    NOT NULL    -- host and process
);
CREATE INDEX failure_message ON filao.failure (message, id);

-- What happened to messages of queues that keep a history.
CREATE TABLE filao.event (
  id      bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  queue   text    NOT NULL,    -- its name: the events outlive it
  message text    NOT NULL,    -- the public id: they outlive the message too
  at      bigint  NOT NULL,
  until   bigint  NOT NULL,    -- kept so long
  what    text    NOT NULL,    -- see filao.engine.Event
  attempt integer NOT NULL,
  who     text    NOT NULL,
  detail  text    NOT NULL
);
CREATE INDEX event_message ON filao.event (message, id);
CREATE INDEX event_until   ON filao.event (until);

CREATE TABLE filao.dedup (
  queue   integer NOT NULL,
  kind    "char"  NOT NULL,    -- k: a dedup_key; m: a message_id
  key     text    NOT NULL,
  message text    NOT NULL,    -- the id of the message that came first
  until   bigint,              -- remembered so long; NULL: while the message is pending
  PRIMARY KEY (queue, kind, key)
);
CREATE INDEX dedup_until ON filao.dedup (until) WHERE until IS NOT NULL;

CREATE TABLE filao.halted (    -- groups that wait for an operator
  queue integer NOT NULL,
  grp   text    NOT NULL,
  PRIMARY KEY (queue, grp)
);

-- Groups in which a transaction of a user's changed something: the next receive sees to them.
CREATE TABLE filao.unarranged (
  queue    integer NOT NULL,
  grp      text    NOT NULL,
  noted_in xid8    NOT NULL DEFAULT pg_current_xact_id(), -- the transaction; see seen.sql
  lowest   bigint                -- the lowest id that was sent to it there; NULL: none was
);
CREATE INDEX unarranged_noted ON filao.unarranged (queue, noted_in);
ALTER TABLE filao.unarranged REPLICA IDENTITY FULL;  -- or a publication of all tables would refuse its deletes

-- Where a group begins: of its messages that wait or are leased none has a lower id than the highest `lowest`. It is
-- written when a look for a group's head walked over much that is dead, as under an old transaction.
CREATE TABLE filao.floor (
  queue  integer NOT NULL,
  grp    text    NOT NULL,
  lowest bigint  NOT NULL,
  file   oid     NOT NULL,     -- of the table of messages for which this holds
  at     bigint  NOT NULL,     -- when it was seen
  PRIMARY KEY (queue, grp, lowest)
);

-- What a queue counts, in rows of its own for each backend that counts it, so that nobody waits for anybody, and for
-- each slot of some two seconds: a row that is updated for ever is, under an old transaction, a chain of dead
-- versions without end. Their sum is what is true; old slots, and the rows of backends that are gone, are folded into
-- those of backend 0.
CREATE TABLE filao.counter (
  queue   integer NOT NULL,
  backend integer NOT NULL,
  slot    bigint  NOT NULL,    -- of 2,048 milliseconds
  name    text    NOT NULL,    -- a field of filao.engine.QueueStats; of the dead also with why: dead:expired
  value   bigint  NOT NULL,
  PRIMARY KEY (queue, backend, slot, name)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000,
        autovacuum_vacuum_cost_delay = 0);

CREATE TABLE filao.process (   -- every process that receives here; tokens carry its id, so the id is never reused
  id         integer PRIMARY KEY DEFAULT floor(random() * 2147483646.0::float8)::integer + 1,
  name       text   NOT NULL,  -- host and process, for people
  started_at bigint NOT NULL,
  has_session boolean NOT NULL, -- it holds an advisory lock while it lives
  state      text   NOT NULL DEFAULT '', -- how it is doing, in a worker's words
  reported_at bigint NOT NULL DEFAULT 0
);

-- Processes to call when a queue gets something. A crash of the server ends their sessions, so this needs no WAL. It
-- has no sequence: that of an unlogged table is damaged on a standby that was promoted.
CREATE UNLOGGED TABLE filao.waiting (
  queue   integer NOT NULL,
  since   bigint  NOT NULL,    -- its place: those that have waited longest are called first
  process integer NOT NULL,
  wants   integer NOT NULL     -- how many messages it waits for
);
CREATE INDEX waiting_since ON filao.waiting (queue, since);
CREATE SEQUENCE filao.place CACHE 1;

CREATE TABLE filao.audit (     -- what operators did on the dashboard; see filao.overview.Deed
  id       bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  at       bigint NOT NULL,
  who      text   NOT NULL,
  what     text   NOT NULL,
  queue    text   NOT NULL,    -- its name: a queue that was deleted stays in the log
  about    text   NOT NULL,
  wanted   bigint NOT NULL,
  done     bigint NOT NULL DEFAULT 0,
  ended_at bigint,
  outcome  text   NOT NULL DEFAULT ''
);
