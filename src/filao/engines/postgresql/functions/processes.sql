-- Processes that receive, and what is cleared up behind them.

-- Take over the leases of a process that died, or give back those of one that leaves, so many at most; return how many
-- there were. When there are no more, it is no longer among those that receive.
CREATE OR REPLACE FUNCTION filao.strike_off(p integer, moment bigint, died boolean, most integer DEFAULT 2000)
RETURNS integer
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
DECLARE
  now  bigint := filao.now(moment);
  q    integer;
  held bigint[];
  done integer := 0;
BEGIN
  FOR q IN SELECT id FROM filao.queue ORDER BY id LOOP
    held := ARRAY(
      SELECT id FROM filao.message
      WHERE queue = q AND state = 'leased' AND token BETWEEN p::bigint << 32 AND (p::bigint + 1 << 32) - 1
      ORDER BY id LIMIT most - done FOR UPDATE SKIP LOCKED
    );
    CONTINUE WHEN held = '{}';
    IF died THEN
      PERFORM filao.lose(q, held, 'crashed', now);
    ELSE
      PERFORM filao.note(q, held, 'released', filao.process_name(p), NULL, now);
      PERFORM filao.release(q, held, NULL, now, false);
    END IF;
    done := done + cardinality(held);
  END LOOP;
  IF done < most THEN
    DELETE FROM filao.waiting WHERE process = p;
    DELETE FROM filao.process WHERE id = p;
  END IF;
  RETURN done;
END
$$;

-- Whether a queue has something for those who wait: ready, due, or to be arranged.
CREATE OR REPLACE FUNCTION filao.has_work(q integer, now bigint) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
  seen  filao.seen := filao.look_at_times(q, filao.look(q, filao.seen(q)), now);
  ready boolean;
BEGIN
  IF cardinality(seen.priorities) = 0 AND seen.below IS NOT NULL THEN
    seen := filao.learn(q, seen);
  END IF;
  WHILE cardinality(seen.priorities) > 0 LOOP
    seen.floors[1] := filao.first_ready(q, seen.priorities[1], seen.floors[1]);
    EXIT WHEN seen.floors[1] IS NOT NULL;
    seen.priorities := seen.priorities[2:];
    seen.floors := seen.floors[2:];
  END LOOP;
  ready := cardinality(seen.priorities) > 0 OR seen.below IS NOT NULL;
  PERFORM filao.remember_seen(q, seen);
  RETURN ready OR seen.noted IS NOT NULL OR coalesce(least(seen.delayed, seen.leased, seen.expiring) <= now, false);
END
$$;

-- Look after all processes: call those who wait where there is something that nobody called them for, such as sends in
-- users' transactions, or what somebody was called for who stands still. Returns how many live, and who shows no sign
-- of life.
CREATE OR REPLACE FUNCTION filao.watch(
  p integer, moment bigint, alive bigint, OUT living integer, OUT missing integer[]
)
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
DECLARE
  now    bigint := filao.now(moment);
  lively integer[] := ARRAY(
    SELECT DISTINCT objid::bigint::integer FROM pg_locks  -- two sessions of a process may hold it
    WHERE locktype = 'advisory' AND classid::bigint = alive AND objsubid = 2
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
  );
  q      integer;
BEGIN
  living := cardinality(lively);
  missing := ARRAY(SELECT id FROM filao.process WHERE has_session AND id <> p AND id <> ALL (lively));
  FOR q IN SELECT id FROM filao.queue WHERE NOT paused LOOP
    IF filao.first_waiting(q) IS NOT NULL AND filao.has_work(q, now) THEN
      PERFORM filao.call(ARRAY[q], ARRAY[100]);
    END IF;
  END LOOP;
END
$$;

-- Fold some counters of old slots and of backends that are gone; return how many there were.
CREATE OR REPLACE FUNCTION filao.fold(most integer) RETURNS integer LANGUAGE plpgsql AS $$
DECLARE
  folded integer;
  lost   bigint;
BEGIN
  WITH old AS MATERIALIZED ( -- a user's transaction may still be counting in one
    SELECT c.ctid AS spot FROM filao.counter c
    WHERE c.backend <> 0 AND (c.slot < (filao.wall() >> 11) - 4
                              OR NOT EXISTS (SELECT FROM pg_stat_activity a WHERE a.pid = c.backend))
    LIMIT most FOR UPDATE SKIP LOCKED
  ), gone AS (
    DELETE FROM filao.counter c WHERE c.ctid = ANY (ARRAY(SELECT old.spot FROM old)) RETURNING c.queue, c.name, c.value
  ), sums AS (
    INSERT INTO filao.counter AS c (queue, backend, slot, name, value)
    SELECT gone.queue, 0, 0, gone.name, sum(gone.value) FROM gone GROUP BY 1, 4
    ON CONFLICT (queue, backend, slot, name) DO UPDATE SET value = c.value + excluded.value
    RETURNING c.queue
  )
  SELECT count(*), count(DISTINCT (queue, name)) - (SELECT count(*) FROM sums) INTO folded, lost FROM gone;
  IF lost > 0 THEN
    PERFORM filao.skipped('filao.counter');
  END IF;
  RETURN folded;
END
$$;

-- Forget old events and old deduplication keys, those from a time on, and fold old counters, which come first. Returns
-- up to which time keys and events were forgotten, 0 while there are counters; NULL when that was all.
--
-- Invariant: a slice of each at a time. The next begins where this one ended: what it removed may lie there as dead.
CREATE OR REPLACE FUNCTION filao.tidy(moment bigint, since bigint = 0) RETURNS bigint
LANGUAGE plpgsql SET enable_seqscan = off SET enable_sort = off SET jit = off AS $$  -- see pick.sql
DECLARE
  now    bigint := filao.now(moment);
  most   CONSTANT integer := 1000;  -- rows in one transaction, which takes some 10 ms
  spots  tid[];
  keys   bigint;  -- up to which time they were forgotten
  events bigint;
BEGIN
  IF since = 0 AND pg_try_advisory_xact_lock(filao.group_key(0, 'tidy')) THEN
    IF filao.fold(most) = most THEN
      RETURN 0;
    END IF;
    DELETE FROM filao.floor f WHERE f.at < now - 600000;  -- as a copied row may lie below one
    DELETE FROM filao.process p -- behind a pooler nobody sees a process die
    WHERE NOT p.has_session AND p.started_at < now - 86400000 AND NOT EXISTS (
      SELECT FROM filao.message m WHERE m.state = 'leased' AND m.token >> 32 = p.id
    );
  END IF;
  SELECT array_agg(old.ctid), CASE WHEN count(*) = most THEN max(old.until) END INTO spots, keys
  FROM (
    SELECT ctid, until FROM filao.dedup
    WHERE until >= since AND until <= now ORDER BY until LIMIT most FOR UPDATE SKIP LOCKED
  ) AS old;
  DELETE FROM filao.dedup WHERE ctid = ANY (spots);
  SELECT array_agg(old.ctid), CASE WHEN count(*) = most THEN max(old.until) END INTO spots, events
  FROM (
    SELECT ctid, until FROM filao.event
    WHERE until >= since AND until <= now ORDER BY until LIMIT most FOR UPDATE SKIP LOCKED
  ) AS old;
  DELETE FROM filao.event WHERE ctid = ANY (spots);
  RETURN least(keys, events);
END
$$;
