-- The verbs of a queue, as functions, so that each is one round trip, and so that a send joins a user's transaction on
-- whatever connection holds it. How messages move from state to state is as in engines/sqlite/moves.py.
--
-- Many transactions do this at once (READ COMMITTED). What keeps them apart:
--   * A lease is a row's token. Whoever settles or extends compares it in the statement that writes, and it is overwritten
--     only when somebody else receives the message.
--   * Whatever looks for work skips rows that others have locked; it never waits for them.
--   * Of a group, only whoever holds its advisory lock changes which message is let through. A receive that cannot have the
--     lock at once leaves that message to the next. A batch takes the locks of its groups first, in order.
--   * In a transaction that the user holds, which may last, groups are not locked but noted down (`later`), and arranged by
--     whoever receives next.

-- A function that is called from outside sets what its plans rest on. They are made once, when a table may be empty, and
-- must serve when it holds millions: so a sequential scan is never right, and no plan is worth compiling.

-- The server's wall clock, in milliseconds since 1970.
CREATE OR REPLACE FUNCTION filao.wall() RETURNS bigint LANGUAGE sql VOLATILE AS $$
  SELECT floor(extract(epoch FROM clock_timestamp()) * 1000::numeric)::bigint
$$;

-- By how much the wall clock is ahead when so much time has passed since it was so much ahead: the queues' time follows it
-- by a twentieth of the time that passes, so that a jump changes no duration by more than that.
CREATE OR REPLACE FUNCTION filao.still_ahead(ahead bigint, passed bigint) RETURNS bigint LANGUAGE sql IMMUTABLE AS $$
  SELECT CASE WHEN ahead > 0 THEN greatest(ahead - greatest(passed, 0) / 20, 0)
              ELSE least(ahead + greatest(passed, 0) / 20, 0) END
$$;

-- The queues' time, in milliseconds since 1970, for calls from outside.
CREATE OR REPLACE FUNCTION filao.clock() RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN
  RETURN filao.now(NULL);
END
$$;

-- What the wall clock would show if it had never jumped, and the sum of its jumps: see filao.note_jump.
CREATE OR REPLACE FUNCTION filao.even_clock(OUT even bigint, OUT jumped bigint) LANGUAGE plpgsql AS $$
BEGIN
  jumped := coalesce((SELECT (value::bigint[])[1] FROM filao.meta WHERE name = 'clock'), 0);
  even := filao.wall() - jumped;
END
$$;

-- Note that the wall clock jumped by so many milliseconds since the sum of its jumps was `was`, unless somebody did so.
CREATE OR REPLACE FUNCTION filao.note_jump(was bigint, by bigint) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  wall bigint := filao.wall();
  j    bigint[];
BEGIN
  INSERT INTO filao.meta VALUES ('clock', '{0,0,0}') ON CONFLICT DO NOTHING;
  SELECT value::bigint[] INTO j FROM filao.meta WHERE name = 'clock' FOR UPDATE;
  IF j[1] = was THEN
    UPDATE filao.meta SET value = ARRAY[was + by, filao.still_ahead(j[2], wall - by - j[3]) + by, wall]::text
    WHERE name = 'clock';
  END IF;
END
$$;

-- Whether whoever called us owns the tables, and so is trusted with all that is in them.
CREATE OR REPLACE FUNCTION filao.is_owner() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
  RETURN pg_has_role(session_user, (SELECT relowner FROM pg_class WHERE oid = 'filao.message'::regclass), 'MEMBER');
END
$$;

-- The queues' time. A negative `moment` is what the even clock shows, as far as the caller knows: it is an error when that
-- is not so, for then the wall clock may have jumped, and nobody has noted it. Another is what an owner's test says that it
-- is: in the future all leases, keys and times to live are over.
CREATE OR REPLACE FUNCTION filao.now(moment bigint) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
  jump CONSTANT bigint := 1000;  -- as in clock.py
  wall bigint := filao.wall();
  j    bigint[];
BEGIN
  IF moment >= 0 THEN
    IF NOT filao.is_owner() THEN
      RAISE insufficient_privilege USING MESSAGE = 'only the owner of the schema filao may say what time it is';
    END IF;
    RETURN moment;
  END IF;
  SELECT value::bigint[] INTO j FROM filao.meta WHERE name = 'clock';
  IF abs(wall - coalesce(j[1], 0) + moment) > jump THEN
    RAISE SQLSTATE 'FL001' USING MESSAGE = 'the clocks of the server and of the process differ';
  END IF;
  RETURN wall - coalesce(filao.still_ahead(j[2], wall - j[3]), 0);
END
$$;

-- A function that reads tables is in PL/pgSQL, which keeps its plans; one in SQL is planned anew at each call.

-- Add to the counters of a queue.
CREATE OR REPLACE FUNCTION filao.count(q integer, names text[], amounts bigint[]) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO filao.counter AS c (queue, backend, slot, name, value)
  SELECT q, pg_backend_pid(), floor(extract(epoch FROM clock_timestamp()) / 8.192)::bigint, given.name, given.amount
  FROM unnest(names, amounts) AS given (name, amount)
  WHERE given.amount <> 0
  ON CONFLICT (queue, backend, slot, name) DO UPDATE SET value = c.value + excluded.value;
END
$$;

CREATE OR REPLACE FUNCTION filao.count_move(q integer, was filao.state, becomes filao.state) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
  IF was <> becomes THEN
    PERFORM filao.count(q, ARRAY[was::text, becomes::text], ARRAY[-1, 1]);
  END IF;
END
$$;

-- Count a message that lies among the dead no more.
CREATE OR REPLACE FUNCTION filao.count_alive(m filao.message) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  IF m.state = 'dead' THEN
    PERFORM filao.count(m.queue, ARRAY['dead:' || coalesce(m.reason, '')], ARRAY[-1]);
  END IF;
END
$$;

-- The first part of ids: random, drawn for each send, so that an id cannot be guessed, and after a restore or a failover is
-- never given again.
CREATE OR REPLACE FUNCTION filao.prefix(salt bigint) RETURNS text LANGUAGE sql IMMUTABLE AS $$
  SELECT lpad(to_hex(salt), 16, '0') || '-'
$$;

-- A message's public id. One from before version 2 has no salt: its first part is the database's name.
CREATE OR REPLACE FUNCTION filao.name_of(m filao.message) RETURNS text LANGUAGE sql STABLE AS $$
  SELECT coalesce(
    m.message_id,
    coalesce(filao.prefix(m.salt), (SELECT value || '-' FROM filao.meta WHERE name = 'database')) || m.id::text
  )
$$;

-- The number of the message with this public id; of one that is gone, the number that it had.
CREATE OR REPLACE FUNCTION filao.number_of(q integer, wanted text) RETURNS bigint LANGUAGE sql VOLATILE AS $$
  SELECT coalesce(
    (SELECT m.id FROM filao.message m WHERE m.queue = q AND m.message_id = wanted ORDER BY m.id LIMIT 1),
    (SELECT given.number
     FROM (SELECT substring(wanted, '^[0-9a-f]{16}-([0-9]{1,18})$')::bigint AS number) AS given
     WHERE NOT EXISTS (SELECT FROM filao.message m WHERE m.id = given.number AND filao.name_of(m) <> wanted))
  )
$$;

-- Many contents as one value and their lengths, which is written faster than an array of them.
CREATE OR REPLACE FUNCTION filao.split(joined bytea, lengths integer[]) RETURNS bytea[] LANGUAGE sql IMMUTABLE AS $$
  SELECT array_agg(substring(joined FROM (ends - length + 1)::integer FOR length) ORDER BY n)
  FROM (SELECT length, n, sum(length) OVER (ORDER BY n) AS ends FROM unnest(lengths) WITH ORDINALITY AS given (length, n)) AS parts
$$;

-- --- groups ------------------------------------------------------------------------------------------------------------

-- The key of the lock of a group. Groups share 2,048 locks, because a server has room for some 6,400, for all its databases:
-- that groups wait for one another for a moment is better than that nobody gets a lock.
CREATE OR REPLACE FUNCTION filao.group_key(q integer, g text) RETURNS bigint LANGUAGE sql IMMUTABLE AS $$
  SELECT 1181314145000000 + (hashtextextended(g, q) & 2047)
$$;

-- Take the locks of groups, in one order for all.
CREATE OR REPLACE FUNCTION filao.lock_groups(queues integer[], groups text[]) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  lock bigint;
BEGIN
  FOR lock IN SELECT DISTINCT filao.group_key(q, g) FROM unnest(queues, groups) AS given (q, g) ORDER BY 1 LOOP
    PERFORM pg_advisory_xact_lock(lock);
  END LOOP;
END
$$;

-- The first message of a group in a state. It is written so that only one index can serve, whatever the tables hold.
CREATE OR REPLACE FUNCTION filao.first_of(q integer, g text, s filao.state) RETURNS bigint LANGUAGE plpgsql AS $$
BEGIN
  RETURN (
    SELECT id FROM filao.message
    WHERE queue = q AND (grp, state) >= (g, s) AND (grp, state) <= (g, s) AND grp IS NOT NULL
    ORDER BY grp, state, id LIMIT 1
  );
END
$$;

-- Move a message from one state to another; false when it is in neither.
CREATE OR REPLACE FUNCTION filao.set_state(number bigint, was filao.state, becomes filao.state) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
  UPDATE filao.message SET state = becomes, moved_in = pg_current_xact_id() WHERE id = number AND state = was;
  RETURN FOUND;
END
$$;

-- Let the first message of each of some groups through and hold back the others; nobody moves while one is leased.
CREATE OR REPLACE FUNCTION filao.arrange_all(q integer, groups text[], now bigint, later boolean) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
  g         text;
  skips     boolean;
  halts     boolean;
  leased    bigint;
  ready     bigint;
  delayed   bigint;
  blocked   bigint;
  head      bigint;
  due       boolean;
  more      bigint[] := '{0,0,0}';  -- ready, delayed and blocked messages, than there were
BEGIN
  IF later THEN
    INSERT INTO filao.unarranged (queue, grp) SELECT DISTINCT q, given.g FROM unnest(groups) AS given (g);
    RETURN;
  END IF;
  SELECT skips_failed, halts_dead INTO STRICT skips, halts FROM filao.queue WHERE id = q;
  FOREACH g IN ARRAY groups LOOP
    PERFORM pg_advisory_xact_lock(filao.group_key(q, g));
    LOOP
      leased := filao.first_of(q, g, 'leased');
      EXIT WHEN leased IS NOT NULL;
      ready := filao.first_of(q, g, 'ready');
      delayed := CASE WHEN NOT skips THEN filao.first_of(q, g, 'delayed') END;  -- else it is overtaken, not waited for
      blocked := filao.first_of(q, g, 'blocked');
      head := least(ready, delayed, blocked);
      IF halts AND EXISTS (SELECT FROM filao.halted h WHERE h.queue = q AND h.grp = g) THEN
        head := NULL;
      END IF;
      IF ready IS DISTINCT FROM head AND filao.set_state(ready, 'ready', 'blocked') THEN
        more := ARRAY[more[1] - 1, more[2], more[3] + 1];
      END IF;
      IF delayed <> head AND filao.set_state(delayed, 'delayed', 'blocked') THEN
        more := ARRAY[more[1], more[2] - 1, more[3] + 1];
      END IF;
      EXIT WHEN head IS NULL OR head IS DISTINCT FROM blocked;
      SELECT at <= now INTO due FROM filao.message WHERE id = head;
      IF filao.set_state(head, 'blocked', CASE WHEN due THEN 'ready' ELSE 'delayed' END::filao.state) THEN
        more := ARRAY[more[1] + due::integer, more[2] + (NOT due)::integer, more[3] - 1];
      END IF;
      EXIT WHEN due OR NOT skips;
    END LOOP;
  END LOOP;
  PERFORM filao.count(q, ARRAY['ready', 'delayed', 'blocked'], more);
END
$$;

-- Let the first message of a group through, if there is a group.
CREATE OR REPLACE FUNCTION filao.arrange(q integer, g text, now bigint, later boolean) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  IF g IS NOT NULL THEN
    PERFORM filao.arrange_all(q, ARRAY[g], now, later);
  END IF;
END
$$;

-- See to groups that were noted down, as far as nobody else has their locks; return how many notes are done with.
CREATE OR REPLACE FUNCTION filao.arrange_noted(q integer, now bigint) RETURNS integer
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
DECLARE
  most   CONSTANT integer := 500;  -- notes in one transaction
  notes  tid[];
  groups text[];
BEGIN
  SELECT array_agg(n.note), array_agg(DISTINCT n.grp) INTO notes, groups
  FROM (SELECT ctid AS note, grp FROM filao.unarranged WHERE queue = q LIMIT most FOR UPDATE SKIP LOCKED) AS n
  WHERE pg_try_advisory_xact_lock(filao.group_key(q, n.grp));
  IF notes IS NULL THEN
    RETURN 0;
  END IF;
  DELETE FROM filao.unarranged WHERE ctid = ANY (notes);
  PERFORM filao.arrange_all(q, groups, now, false);
  RETURN cardinality(notes);
END
$$;

-- --- deduplication -----------------------------------------------------------------------------------------------------

-- The id of the message that came first under one of these keys; NULL when both are new.
CREATE OR REPLACE FUNCTION filao.remembered(q integer, dedup_key text, message_id text, now bigint) RETURNS text
LANGUAGE sql VOLATILE AS $$
  SELECT d.message
  FROM filao.dedup d
  WHERE d.queue = q AND ((d.kind = 'k' AND d.key = dedup_key) OR (d.kind = 'm' AND d.key = message_id))
    AND (d.until IS NULL OR d.until > now)
  ORDER BY d.kind
  LIMIT 1
$$;

-- Know a new message's key as long as it is pending; false when another message has it, whatever that one is called: two
-- that were sent at the same time under one message_id have the same name.
CREATE OR REPLACE FUNCTION filao.remember(q integer, k "char", wanted text, name text, now bigint) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO filao.dedup AS d (queue, kind, key, message) VALUES (q, k, wanted, name)
  ON CONFLICT (queue, kind, key) DO UPDATE SET message = excluded.message, until = NULL
  WHERE d.until <= now;
  RETURN FOUND;
END
$$;

-- Know the key of a message that comes back, if no other message has it by now.
CREATE OR REPLACE FUNCTION filao.remember_again(q integer, wanted text, name text, now bigint) RETURNS void
LANGUAGE sql AS $$
  INSERT INTO filao.dedup AS d (queue, kind, key, message) VALUES (q, 'k', wanted, name)
  ON CONFLICT (queue, kind, key) DO UPDATE SET message = excluded.message, until = NULL
  WHERE d.until <= now OR d.message = excluded.message
$$;

-- Forget the keys of a message at once.
CREATE OR REPLACE FUNCTION filao.forget_keys(q integer, dedup_key text, message_id text, name text) RETURNS void
LANGUAGE sql AS $$
  DELETE FROM filao.dedup d
  WHERE d.queue = q AND d.message = name
    AND ((d.kind = 'k' AND d.key = dedup_key) OR (d.kind = 'm' AND d.key = message_id))
$$;

-- Know the keys of a new message, or return the id of the one that came first. Whoever sends the same at the same time
-- waits here until the other has committed. A message that outlived its time to live has no key, whether or not anybody
-- has looked at it since.
CREATE OR REPLACE FUNCTION filao.claim_keys(
  q integer, dedup_key text, message_id text, name text, now bigint, later boolean
) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
  came_first text;
BEGIN
  LOOP
    came_first := filao.remembered(q, dedup_key, message_id, now);
    CONTINUE WHEN came_first IS NOT NULL AND filao.expire_named(q, came_first, now, later);
    EXIT WHEN came_first IS NOT NULL;
    IF dedup_key IS NULL OR filao.remember(q, 'k', dedup_key, name, now) THEN
      EXIT WHEN message_id IS NULL OR filao.remember(q, 'm', message_id, name, now);
      PERFORM filao.forget_keys(q, dedup_key, NULL, name);
    END IF;
  END LOOP;
  RETURN came_first;
END
$$;

-- Let the keys of a message that has ended be forgotten after the queue's window.
CREATE OR REPLACE FUNCTION filao.start_window(q integer, dedup_key text, message_id text, name text, now bigint)
RETURNS void LANGUAGE sql AS $$
  UPDATE filao.dedup d
  SET until = now + (SELECT dedup_window FROM filao.queue WHERE id = q)
  WHERE d.queue = q AND d.message = name
    AND ((d.kind = 'k' AND d.key = dedup_key) OR (d.kind = 'm' AND d.key = message_id))
$$;

-- --- moves -------------------------------------------------------------------------------------------------------------

-- Put a failed attempt into the message's history, which keeps the last 20.
CREATE OR REPLACE FUNCTION filao.record(m filao.message, outcome text, error text, consumer text, now bigint) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO filao.failure (message, attempt, at, outcome, error, consumer)
  VALUES (m.id, m.attempts, now, outcome, error, consumer);
  UPDATE filao.message SET failures = failures + 1 WHERE id = m.id;
  IF m.failures >= 20 THEN
    DELETE FROM filao.failure
    WHERE id IN (SELECT f.id FROM filao.failure f WHERE f.message = m.id ORDER BY f.id DESC OFFSET 20);
  END IF;
END
$$;

-- Let a message return to its old place, ready now or delayed until `due`, behind those of its group.
CREATE OR REPLACE FUNCTION filao.give_back(m filao.message, due bigint, kept bigint, now bigint, later boolean)
RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  becomes filao.state := CASE WHEN due IS NOT NULL THEN 'delayed' WHEN m.grp IS NULL THEN 'ready' ELSE 'blocked' END;
BEGIN
  UPDATE filao.message
  SET state = becomes, at = coalesce(due, now), token = kept, moved_in = pg_current_xact_id()
  WHERE id = m.id;
  PERFORM filao.count_move(m.queue, m.state, becomes);
  PERFORM filao.arrange(m.queue, m.grp, now, later);
END
$$;

-- Make a message a dead letter.
CREATE OR REPLACE FUNCTION filao.die(m filao.message, why text, now bigint, later boolean) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
  UPDATE filao.message SET state = 'dead', at = now, token = 0, reason = why, moved_in = NULL WHERE id = m.id;
  PERFORM filao.count_move(m.queue, m.state, 'dead');
  PERFORM filao.count(m.queue, ARRAY['died', 'dead:' || why, 'died:' || why], ARRAY[1, 1, 1]);
  IF m.dedup_key IS NOT NULL THEN  -- its message_id stays known as long as the dead letter lies there
    PERFORM filao.start_window(m.queue, m.dedup_key, NULL, filao.name_of(m), now);
  END IF;
  IF m.grp IS NOT NULL AND (SELECT halts_dead FROM filao.queue WHERE id = m.queue) THEN
    INSERT INTO filao.halted (queue, grp) VALUES (m.queue, m.grp) ON CONFLICT DO NOTHING;
  END IF;
  PERFORM filao.arrange(m.queue, m.grp, now, later);
END
$$;

-- Clear up behind a message whose row is deleted.
CREATE OR REPLACE FUNCTION filao.forget(m filao.message, now bigint, later boolean) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  IF m.failures > 0 THEN
    DELETE FROM filao.failure WHERE message = m.id;
  END IF;
  IF m.dedup_key IS NOT NULL OR m.message_id IS NOT NULL THEN
    PERFORM filao.start_window(m.queue, m.dedup_key, m.message_id, filao.name_of(m), now);
  END IF;
  PERFORM filao.arrange(m.queue, m.grp, now, later);
END
$$;

-- Remove a message for good, and count it under `counter`.
CREATE OR REPLACE FUNCTION filao.discard(m filao.message, counter text, now bigint, later boolean) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
  DELETE FROM filao.message WHERE id = m.id;
  PERFORM filao.count(m.queue, ARRAY[m.state::text, counter], ARRAY[-1, 1]);
  PERFORM filao.count_alive(m);
  PERFORM filao.forget(m, now, later);
END
$$;

-- Bury a message that outlived its time to live, or drop it if the queue says so. It holds no key any more, but that of a
-- dead letter, which keeps its message_id because that is its name.
CREATE OR REPLACE FUNCTION filao.expire(m filao.message, now bigint, later boolean) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  dropped boolean := (SELECT drops_old FROM filao.queue WHERE id = m.queue);
BEGIN
  IF m.dedup_key IS NOT NULL OR (dropped AND m.message_id IS NOT NULL) THEN
    PERFORM filao.forget_keys(m.queue, m.dedup_key, CASE WHEN dropped THEN m.message_id END, filao.name_of(m));
  END IF;
  IF dropped THEN
    PERFORM filao.discard(m, 'dropped', now, later);
  ELSE
    PERFORM filao.record(m, 'expired', 'it outlived its ttl', '', now);
    PERFORM filao.die(m, 'expired', now, later);
  END IF;
END
$$;

-- Expire so many messages at most, from a time on, and return how many there were. What somebody else has locked is left to
-- them.
CREATE OR REPLACE FUNCTION filao.expire_some(q integer, most bigint, now bigint, later boolean, since bigint = 0)
RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
  m    filao.message;
  done bigint := 0;
BEGIN
  FOR m IN
    SELECT * FROM filao.message
    WHERE queue = q AND expires_at >= since AND expires_at <= now AND state IN ('ready', 'delayed', 'blocked')
    ORDER BY expires_at LIMIT most FOR UPDATE SKIP LOCKED
  LOOP
    CONTINUE WHEN NOT later AND m.grp IS NOT NULL AND NOT pg_try_advisory_xact_lock(filao.group_key(q, m.grp));
    SELECT * INTO m FROM filao.message WHERE id = m.id;  -- another of its group may have moved it in this loop
    PERFORM filao.expire(m, now, later);
    done := done + 1;
  END LOOP;
  RETURN done;
END
$$;

-- Expire what outlived its time to live, so that an operator sees it where it is.
CREATE OR REPLACE FUNCTION filao.expire_all(moment bigint) RETURNS void
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
DECLARE
  now bigint := filao.now(moment);
  q   integer;
BEGIN
  FOR q IN SELECT id FROM filao.queue ORDER BY id LOOP
    PERFORM filao.expire_some(q, 5000, now, false);
  END LOOP;
END
$$;

-- Expire the message of this name; false when it has not outlived its time to live, or is a dead letter, which keeps its
-- message_id.
CREATE OR REPLACE FUNCTION filao.expire_named(q integer, name text, now bigint, later boolean) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
  m filao.message;
BEGIN
  SELECT * INTO m FROM filao.message
  WHERE id = filao.number_of(q, name) AND expires_at <= now AND state IN ('ready', 'delayed', 'blocked') FOR UPDATE;
  IF NOT FOUND THEN
    RETURN false;
  END IF;
  PERFORM filao.expire(m, now, later);
  RETURN true;
END
$$;

-- End a lease whose consumer said nothing: the attempt is used. The token stays until somebody receives the message, so
-- that a late ack of work that was done still counts.
CREATE OR REPLACE FUNCTION filao.lose(m filao.message, outcome text, now bigint) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  holder text := coalesce((SELECT name FROM filao.process WHERE id = m.token >> 32), '');
BEGIN
  PERFORM filao.count(m.queue, ARRAY['lost'], ARRAY[1]);
  PERFORM filao.record(m, outcome, '', holder, now);
  IF m.attempts >= (SELECT max_attempts FROM filao.queue WHERE id = m.queue) THEN
    PERFORM filao.die(m, 'max_attempts', now, false);
  ELSE
    PERFORM filao.give_back(m, NULL, m.token, now, false);
  END IF;
END
$$;
