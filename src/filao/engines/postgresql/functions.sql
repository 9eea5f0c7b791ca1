-- The verbs of a queue, as functions, so that each is one round trip, and so that a send joins a user's transaction on
-- whatever connection holds it. How messages move from state to state is as in engines/sqlite/books.py.
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

-- The time, in milliseconds since 1970.
CREATE OR REPLACE FUNCTION filao.clock() RETURNS bigint LANGUAGE sql VOLATILE AS $$
  SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::bigint
$$;

-- Add to the counters of a queue.
CREATE OR REPLACE FUNCTION filao.count(q integer, names text[], amounts bigint[]) RETURNS void LANGUAGE sql AS $$
  INSERT INTO filao.counter AS c (queue, backend, name, value)
  SELECT q, pg_backend_pid(), given.name, given.amount
  FROM unnest(names, amounts) AS given (name, amount)
  WHERE given.amount <> 0
  ON CONFLICT (queue, backend, name) DO UPDATE SET value = c.value + excluded.value
$$;

CREATE OR REPLACE FUNCTION filao.count_move(q integer, was filao.state, becomes filao.state) RETURNS void
LANGUAGE sql AS $$
  SELECT filao.count(q, ARRAY[was::text, becomes::text], ARRAY[-1, 1]) WHERE was <> becomes
$$;

-- A message's public id.
CREATE OR REPLACE FUNCTION filao.name_of(number bigint, message_id text) RETURNS text LANGUAGE sql STABLE AS $$
  SELECT coalesce(message_id, (SELECT value FROM filao.meta WHERE name = 'database') || '-' || number)
$$;

-- Many contents as one value and their lengths, which is written faster than an array of them.
CREATE OR REPLACE FUNCTION filao.split(joined bytea, lengths integer[]) RETURNS bytea[] LANGUAGE sql IMMUTABLE AS $$
  SELECT array_agg(substring(joined FROM (ends - length + 1)::integer FOR length) ORDER BY n)
  FROM (SELECT length, n, sum(length) OVER (ORDER BY n) AS ends FROM unnest(lengths) WITH ORDINALITY AS given (length, n)) AS parts
$$;

-- --- groups ------------------------------------------------------------------------------------------------------------

CREATE OR REPLACE FUNCTION filao.group_key(q integer, g text) RETURNS bigint LANGUAGE sql IMMUTABLE AS $$
  SELECT hashtextextended(g, q)
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

CREATE OR REPLACE FUNCTION filao.first_of(q integer, g text, s filao.state) RETURNS bigint LANGUAGE sql VOLATILE AS $$
  SELECT id FROM filao.message WHERE queue = q AND grp = g AND state = s ORDER BY id LIMIT 1
$$;

CREATE OR REPLACE FUNCTION filao.set_state(q integer, number bigint, was filao.state, becomes filao.state) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
  UPDATE filao.message SET state = becomes WHERE id = number AND state = was;
  IF FOUND THEN
    PERFORM filao.count_move(q, was, becomes);
  END IF;
END
$$;

-- Let the first message of a group through and hold back the others; nobody moves while one is leased.
CREATE OR REPLACE FUNCTION filao.arrange(q integer, g text, now bigint, later boolean) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  rules   filao.queue;
  ready   bigint;
  delayed bigint;
  blocked bigint;
  head    bigint;
  due     boolean;
BEGIN
  IF g IS NULL THEN
    RETURN;
  ELSIF later THEN
    INSERT INTO filao.unarranged (queue, grp) VALUES (q, g);
    RETURN;
  END IF;
  PERFORM pg_advisory_xact_lock(filao.group_key(q, g));
  SELECT * INTO STRICT rules FROM filao.queue WHERE id = q;
  LOOP
    EXIT WHEN filao.first_of(q, g, 'leased') IS NOT NULL;
    ready := filao.first_of(q, g, 'ready');
    blocked := filao.first_of(q, g, 'blocked');
    delayed := NULL;
    IF NOT rules.skips_failed THEN  -- else a failed or delayed message is overtaken, not waited for
      delayed := filao.first_of(q, g, 'delayed');
    END IF;
    head := least(ready, delayed, blocked);
    IF rules.halts_dead AND EXISTS (SELECT FROM filao.halted h WHERE h.queue = q AND h.grp = g) THEN
      head := NULL;
    END IF;
    IF ready IS DISTINCT FROM head THEN
      PERFORM filao.set_state(q, ready, 'ready', 'blocked');
    END IF;
    IF delayed <> head THEN
      PERFORM filao.set_state(q, delayed, 'delayed', 'blocked');
    END IF;
    EXIT WHEN head IS NULL OR head IS DISTINCT FROM blocked;
    SELECT at <= now INTO due FROM filao.message WHERE id = head;
    PERFORM filao.set_state(q, head, 'blocked', CASE WHEN due THEN 'ready' ELSE 'delayed' END::filao.state);
    EXIT WHEN due OR NOT rules.skips_failed;
  END LOOP;
END
$$;

-- See to the groups in which a user's transaction changed something, as far as nobody else has their locks.
CREATE OR REPLACE FUNCTION filao.arrange_noted(q integer, now bigint) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  g text;
BEGIN
  FOR g IN
    SELECT DISTINCT grp FROM filao.unarranged WHERE queue = q LIMIT 1000
  LOOP
    IF pg_try_advisory_xact_lock(filao.group_key(q, g)) THEN
      DELETE FROM filao.unarranged WHERE queue = q AND grp = g;
      PERFORM filao.arrange(q, g, now, false);
    END IF;
  END LOOP;
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

-- Know a key as long as its message is pending; false when another message has it.
CREATE OR REPLACE FUNCTION filao.remember(q integer, k "char", wanted text, name text, now bigint) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO filao.dedup AS d (queue, kind, key, message) VALUES (q, k, wanted, name)
  ON CONFLICT (queue, kind, key) DO UPDATE SET message = excluded.message, until = NULL
  WHERE d.until <= now OR d.message = excluded.message;
  RETURN FOUND;
END
$$;

-- Know the keys of a new message, or return the id of the one that came first. Whoever sends the same at the same time
-- waits here until the other has committed.
CREATE OR REPLACE FUNCTION filao.claim_keys(q integer, dedup_key text, message_id text, name text, now bigint)
RETURNS text LANGUAGE plpgsql AS $$
DECLARE
  came_first text;
BEGIN
  LOOP
    came_first := filao.remembered(q, dedup_key, message_id, now);
    EXIT WHEN came_first IS NOT NULL;
    IF dedup_key IS NULL OR filao.remember(q, 'k', dedup_key, name, now) THEN
      EXIT WHEN message_id IS NULL OR filao.remember(q, 'm', message_id, name, now);
      DELETE FROM filao.dedup d WHERE d.queue = q AND d.kind = 'k' AND d.key = dedup_key AND d.message = name;
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
  UPDATE filao.message SET state = becomes, at = coalesce(due, now), token = kept WHERE id = m.id;
  PERFORM filao.count_move(m.queue, m.state, becomes);
  PERFORM filao.arrange(m.queue, m.grp, now, later);
END
$$;

-- Make a message a dead letter.
CREATE OR REPLACE FUNCTION filao.die(m filao.message, why text, now bigint, later boolean) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
  UPDATE filao.message SET state = 'dead', at = now, token = 0, reason = why WHERE id = m.id;
  PERFORM filao.count_move(m.queue, m.state, 'dead');
  PERFORM filao.count(m.queue, ARRAY['died'], ARRAY[1]);
  IF m.dedup_key IS NOT NULL THEN  -- its message_id stays known as long as the dead letter lies there
    PERFORM filao.start_window(m.queue, m.dedup_key, NULL, filao.name_of(m.id, m.message_id), now);
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
    PERFORM filao.start_window(m.queue, m.dedup_key, m.message_id, filao.name_of(m.id, m.message_id), now);
  END IF;
  PERFORM filao.arrange(m.queue, m.grp, now, later);
END
$$;

-- Remove a message for good, and count it under `counter`.
CREATE OR REPLACE FUNCTION filao.discard(m filao.message, counter text, now bigint) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  DELETE FROM filao.message WHERE id = m.id;
  PERFORM filao.count(m.queue, ARRAY[m.state::text, counter], ARRAY[-1, 1]);
  PERFORM filao.forget(m, now, false);
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

-- --- send --------------------------------------------------------------------------------------------------------------

-- How many messages count towards max_length.
CREATE OR REPLACE FUNCTION filao.pending(q integer) RETURNS bigint LANGUAGE sql VOLATILE AS $$
  SELECT coalesce(sum(value), 0)::bigint
  FROM filao.counter
  WHERE queue = q AND name IN ('ready', 'delayed', 'leased', 'blocked')
$$;

-- Make the oldest waiting message a dead letter; false when there is none.
CREATE OR REPLACE FUNCTION filao.drop_oldest(q integer, now bigint) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
  m filao.message;
BEGIN
  WITH RECURSIVE heads AS (  -- the first of each priority: one look-up for each that is in use
    (SELECT id, priority FROM filao.message WHERE queue = q AND state = 'ready' ORDER BY priority DESC, id LIMIT 1)
    UNION ALL
    SELECT below.* FROM heads, LATERAL (
      SELECT id, priority FROM filao.message
      WHERE queue = q AND state = 'ready' AND priority < heads.priority ORDER BY priority DESC, id LIMIT 1
    ) AS below
  )
  SELECT * INTO m FROM filao.message
  WHERE id = coalesce(
    (SELECT min(id) FROM heads),
    (SELECT id FROM filao.message WHERE queue = q AND state = 'delayed' ORDER BY at LIMIT 1)
  )
  FOR UPDATE;
  IF NOT FOUND OR m.state NOT IN ('ready', 'delayed') THEN
    RETURN false;
  END IF;
  PERFORM filao.record(m, 'overflow', 'the queue was full and its rule is to drop the oldest', '', now);
  PERFORM filao.die(m, 'overflow', now, false);
  RETURN true;
END
$$;

-- Make room for so many new messages, or return false.
CREATE OR REPLACE FUNCTION filao.has_room(rules filao.queue, new bigint, now bigint) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
  surplus bigint := filao.pending(rules.id) + new - rules.max_length;
BEGIN
  WHILE new > 0 AND surplus > 0 LOOP
    IF NOT rules.drops_oldest OR new > rules.max_length OR NOT filao.drop_oldest(rules.id, now) THEN
      RETURN false;
    END IF;
    surplus := surplus - 1;
  END LOOP;
  RETURN true;
END
$$;

-- Store the drafts of some sends, but for duplicates, and return a row for each.
CREATE OR REPLACE FUNCTION filao.store(
  rules filao.queue, now bigint, later boolean, chosen integer[], ops integer[], kinds smallint[], contents bytea[],
  headers text[], delays bigint[], priorities integer[], groups text[], dedup_keys text[], ttls bigint[],
  message_ids text[]
) RETURNS TABLE (place integer, op integer, number bigint, came_first text) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
  prefix  text;
  numbers bigint[] := ARRAY(SELECT nextval('filao.number') FROM generate_series(1, cardinality(contents)));
  twice   integer[] := '{}';
  states  bigint[];
  i       integer;
  g       text;
BEGIN
  IF dedup_keys IS NOT NULL OR message_ids IS NOT NULL THEN
    SELECT value || '-' INTO prefix FROM filao.meta WHERE name = 'database';
    FOR i IN 1 .. cardinality(contents) LOOP
      CONTINUE WHEN ops[i] <> ALL (chosen);
      came_first := filao.claim_keys(rules.id, dedup_keys[i], message_ids[i], coalesce(message_ids[i], prefix || numbers[i]), now);
      IF came_first IS NOT NULL THEN
        twice := twice || i;
        place := i; op := ops[i];
        RETURN NEXT;
      END IF;
    END LOOP;
  END IF;
  WITH stored AS (
    INSERT INTO filao.message (id, queue, state, kind, priority, at, sent_at, expires_at, grp, dedup_key, message_id,
                               headers, content)
    SELECT numbers[n], rules.id,
           CASE WHEN coalesce(delays[n], 0) > 0 AND (groups[n] IS NULL OR rules.skips_failed) THEN 'delayed'
                WHEN groups[n] IS NULL THEN 'ready' ELSE 'blocked' END::filao.state,
           kinds[n], coalesce(priorities[n], 0), now + coalesce(delays[n], 0), now, now + coalesce(ttls[n], rules.ttl),
           groups[n], dedup_keys[n], message_ids[n], headers[n], content
    FROM unnest(contents) WITH ORDINALITY AS given (content, n)
    WHERE ops[n] = ANY (chosen) AND n <> ALL (twice)
    ORDER BY n
    RETURNING state
  )
  SELECT ARRAY[count(*), count(*) FILTER (WHERE state = 'ready'), count(*) FILTER (WHERE state = 'delayed'),
               count(*) FILTER (WHERE state = 'blocked'), cardinality(twice)]
  INTO states FROM stored;
  PERFORM filao.count(rules.id, ARRAY['sent', 'ready', 'delayed', 'blocked', 'duplicates'], states);
  RETURN QUERY
    SELECT n::integer, ops[n], numbers[n], NULL::text
    FROM generate_series(1, cardinality(contents)) AS n
    WHERE ops[n] = ANY (chosen) AND n <> ALL (twice);
  IF groups IS NOT NULL THEN
    FOR g IN
      SELECT DISTINCT given.g FROM unnest(groups, ops) AS given (g, op) WHERE given.g IS NOT NULL AND given.op = ANY (chosen)
    LOOP
      PERFORM filao.arrange(rules.id, g, now, later);
    END LOOP;
  END IF;
END
$$;

-- Store drafts. `ops` tells which belong to one send: all of its drafts are stored, or none. An array that holds nothing but
-- defaults may be NULL. Durations are milliseconds. Returns a row for each draft: its number, or the id of the message that
-- came first; or one row with a `problem` for a whole send.
CREATE OR REPLACE FUNCTION filao.send(
  q integer, moment bigint, later boolean, ops integer[], kinds smallint[], contents bytea[], headers text[],
  delays bigint[], priorities integer[], groups text[], dedup_keys text[], ttls bigint[], message_ids text[]
) RETURNS TABLE (place integer, op integer, number bigint, came_first text, problem text, detail bigint)
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_column
DECLARE
  now    bigint := coalesce(moment, filao.clock());
  rules  filao.queue;
  chosen integer[];
  this   integer;
  new    bigint;
BEGIN
  SELECT * INTO STRICT rules FROM filao.queue WHERE id = q;
  RETURN QUERY
    SELECT 0, ops[n], NULL::bigint, NULL::text, 'too large', max(length(content))::bigint
    FROM unnest(contents) WITH ORDINALITY AS given (content, n)
    WHERE length(content) > rules.body_max
    GROUP BY 2;
  chosen := ARRAY(
    SELECT ops[n] FROM unnest(contents) WITH ORDINALITY AS given (content, n)
    GROUP BY 1 HAVING max(length(content)) <= rules.body_max ORDER BY 1
  );
  IF rules.max_length IS NULL THEN
    RETURN QUERY
      SELECT *, NULL::text, NULL::bigint
      FROM filao.store(rules, now, later, chosen, ops, kinds, contents, headers, delays, priorities, groups, dedup_keys,
                       ttls, message_ids);
    RETURN;
  END IF;
  PERFORM FROM filao.queue WHERE id = q FOR NO KEY UPDATE;  -- one sender at a time, so that the limit is exact
  FOREACH this IN ARRAY chosen LOOP
    SELECT count(DISTINCT coalesce(dedup_keys[n], message_ids[n], n::text)) INTO new
    FROM generate_series(1, cardinality(ops)) AS n
    WHERE ops[n] = this AND filao.remembered(q, dedup_keys[n], message_ids[n], now) IS NULL;
    IF filao.has_room(rules, new, now) THEN
      RETURN QUERY
        SELECT *, NULL::text, NULL::bigint
        FROM filao.store(rules, now, later, ARRAY[this], ops, kinds, contents, headers, delays, priorities, groups,
                         dedup_keys, ttls, message_ids);
    ELSE
      PERFORM filao.count(q, ARRAY['refused'], ARRAY[cardinality(array_positions(ops, this))]);
      place := 0; op := this; number := NULL; came_first := NULL; problem := 'full'; detail := filao.pending(q);
      RETURN NEXT;
    END IF;
  END LOOP;
END
$$;

-- --- receive -----------------------------------------------------------------------------------------------------------

-- Make ready what is due: delayed messages, and those whose lease ran out; bury what outlived its time to live. Whatever
-- somebody else has locked is left to him.
CREATE OR REPLACE FUNCTION filao.make_due(q integer, now bigint) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
  m     filao.message;
  moved bigint;
BEGIN
  IF EXISTS (SELECT FROM filao.message WHERE queue = q AND state = 'delayed' AND at <= now) THEN
    WITH due AS MATERIALIZED (
      SELECT id FROM filao.message
      WHERE queue = q AND state = 'delayed' AND at <= now AND grp IS NULL
      ORDER BY at LIMIT 5000 FOR UPDATE SKIP LOCKED
    )
    UPDATE filao.message AS t SET state = 'ready', at = now, token = 0 FROM due WHERE t.id = due.id;
    GET DIAGNOSTICS moved = ROW_COUNT;
    PERFORM filao.count(q, ARRAY['delayed', 'ready'], ARRAY[-moved, moved]) WHERE moved > 0;
    FOR m IN
      SELECT * FROM filao.message
      WHERE queue = q AND state = 'delayed' AND at <= now AND grp IS NOT NULL
      ORDER BY at LIMIT 1000 FOR UPDATE SKIP LOCKED
    LOOP
      CONTINUE WHEN NOT pg_try_advisory_xact_lock(filao.group_key(q, m.grp));
      SELECT * INTO m FROM filao.message WHERE id = m.id;  -- another of its group may have moved it in this loop
      IF m.state = 'delayed' THEN
        PERFORM filao.give_back(m, NULL, 0, now, false);
      END IF;
    END LOOP;
  END IF;
  FOR m IN
    SELECT * FROM filao.message
    WHERE queue = q AND state = 'leased' AND at <= now
    ORDER BY at LIMIT 1000 FOR UPDATE SKIP LOCKED
  LOOP
    IF m.grp IS NULL OR pg_try_advisory_xact_lock(filao.group_key(q, m.grp)) THEN
      PERFORM filao.lose(m, 'lease_expired', now);
    END IF;
  END LOOP;
  FOR m IN
    SELECT * FROM filao.message
    WHERE queue = q AND expires_at <= now AND state IN ('ready', 'delayed', 'blocked')
    LIMIT 1000 FOR UPDATE SKIP LOCKED
  LOOP
    CONTINUE WHEN m.grp IS NOT NULL AND NOT pg_try_advisory_xact_lock(filao.group_key(q, m.grp));
    SELECT * INTO m FROM filao.message WHERE id = m.id;
    IF (SELECT drops_old FROM filao.queue WHERE id = q) THEN
      PERFORM filao.discard(m, 'dropped', now);
    ELSE
      PERFORM filao.record(m, 'expired', 'it outlived its ttl', '', now);
      PERFORM filao.die(m, 'expired', now, false);
    END IF;
  END LOOP;
  IF EXISTS (SELECT FROM filao.unarranged WHERE queue = q) THEN
    PERFORM filao.arrange_noted(q, now);
  END IF;
END
$$;

-- Lease messages. `waiting` is how many callers are about to wait: when there are fewer messages, their process goes on the
-- waiting list, and a last row without an id says when something is due, in milliseconds: at once for a process that was
-- not on the list when it looked, for what was sent meanwhile called nobody.
CREATE OR REPLACE FUNCTION filao.receive(
  q integer, moment bigint, process integer, lease bigint, token bigint, most integer, waiting integer
) RETURNS TABLE (
  id bigint, priority integer, attempts integer, grp text, dedup_key text, message_id text, headers text, kind smallint,
  content bytea, sent_at bigint, failures integer, crashed boolean, due_in bigint
)
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_column
DECLARE
  now   bigint := coalesce(moment, filao.clock());
  rules filao.queue;
  found bigint := 0;
BEGIN
  SELECT * INTO STRICT rules FROM filao.queue WHERE id = q;
  IF NOT rules.paused THEN
    PERFORM filao.make_due(q, now);
    RETURN QUERY
      WITH picked AS MATERIALIZED (
        SELECT m.id, m.grp FROM filao.message m
        WHERE m.queue = q AND m.state = 'ready'
        ORDER BY m.priority DESC, m.id LIMIT most FOR UPDATE SKIP LOCKED
      ), mine AS MATERIALIZED (
        SELECT picked.id FROM picked
        WHERE picked.grp IS NULL OR pg_try_advisory_xact_lock(filao.group_key(q, picked.grp))
      ), leased AS (
        UPDATE filao.message AS m
        SET state = 'leased', at = now + coalesce(lease, rules.lease), token = receive.token, attempts = m.attempts + 1
        FROM mine WHERE m.id = mine.id
        RETURNING m.*
      )
      SELECT l.id, l.priority, l.attempts, l.grp, l.dedup_key, l.message_id, l.headers, l.kind, l.content, l.sent_at,
             l.failures,
             l.failures > 0 AND 'crashed' = (
               SELECT f.outcome FROM filao.failure f WHERE f.message = l.id ORDER BY f.id DESC LIMIT 1
             ),
             NULL::bigint
      FROM leased l
      ORDER BY l.priority DESC, l.id;
    GET DIAGNOSTICS found = ROW_COUNT;
    PERFORM filao.count(q, ARRAY['ready', 'leased', 'received'], ARRAY[-found, found, found]) WHERE found > 0;
  END IF;
  IF found < greatest(waiting, 1) THEN
    id := NULL; content := NULL;
    due_in := filao.due_in(q, now);
    IF waiting > 0 AND filao.wait(q, process, waiting - found::integer) THEN
      due_in := 0;
    END IF;
    RETURN NEXT;
  END IF;
END
$$;

-- Milliseconds until the next delayed message or running lease is due; NULL when there is none. (GREATEST passes NULL over.)
CREATE OR REPLACE FUNCTION filao.due_in(q integer, now bigint) RETURNS bigint LANGUAGE sql VOLATILE AS $$
  SELECT CASE WHEN due.at IS NOT NULL THEN greatest(0, due.at - now) END
  FROM (SELECT least(
    (SELECT at FROM filao.message WHERE queue = q AND state = 'delayed' ORDER BY at LIMIT 1),
    (SELECT at FROM filao.message WHERE queue = q AND state = 'leased' ORDER BY at LIMIT 1)
  )) AS due (at)
$$;

-- Put a process on the waiting list; false when it stood there. It writes nothing then, so that polling costs no flush.
CREATE OR REPLACE FUNCTION filao.wait(q integer, p integer, wanted integer) RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO filao.waiting (queue, process, wants) VALUES (q, p, wanted) ON CONFLICT DO NOTHING;
  RETURN FOUND;
END
$$;

-- Call those who have waited longest: enough of them for so many messages, each on a channel of its own, so that nobody
-- wakes up in vain. Not in the transaction that sent: a NOTIFY is a lock that all commits wait for.
CREATE OR REPLACE FUNCTION filao.call(queues integer[], amounts integer[]) RETURNS void
LANGUAGE sql SET enable_seqscan = off SET jit = off AS $$
  WITH listed AS (
    SELECT w.queue, w.process, given.amount, sum(w.wants) OVER (PARTITION BY w.queue ORDER BY w.since) - w.wants AS before
    FROM unnest(queues, amounts) AS given (queue, amount)
    CROSS JOIN LATERAL (
      SELECT * FROM filao.waiting w WHERE w.queue = given.queue ORDER BY w.since LIMIT 100
    ) AS w
  ), chosen AS ( -- whoever is being called by another is called by him
    SELECT w.queue, w.process FROM filao.waiting w JOIN listed USING (queue, process)
    WHERE listed.before < listed.amount FOR UPDATE OF w SKIP LOCKED
  ), called AS (
    DELETE FROM filao.waiting w USING chosen WHERE w.queue = chosen.queue AND w.process = chosen.process
    RETURNING w.queue, w.process
  )
  SELECT pg_notify('filao_' || process, queue::text) FROM called
$$;

-- --- settle ------------------------------------------------------------------------------------------------------------

-- How long a message waits after its nth failed attempt: see filao.queue.Backoff.
CREATE OR REPLACE FUNCTION filao.backoff(rules filao.queue, attempt integer) RETURNS bigint LANGUAGE sql VOLATILE AS $$
  SELECT (least(rules.ceiling, rules.first_delay * power(rules.factor, least(attempt - 1, 64)))
          * (1 - rules.jitter * random()))::bigint
$$;

-- End leases, each as its outcome says: ack, nack, reject, malformed or release. Returns the places of those that were lost.
CREATE OR REPLACE FUNCTION filao.settle(
  q integer, moment bigint, later boolean, consumer text, ids bigint[], tokens bigint[], outcomes text[], errors text[],
  delays bigint[]
) RETURNS SETOF integer
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
DECLARE
  now   bigint := coalesce(moment, filao.clock());
  rules filao.queue;
  m     filao.message;
  acked bigint[];
  held  bigint := 0;
  late  bigint := 0;
  i     integer;
BEGIN
  SELECT * INTO STRICT rules FROM filao.queue WHERE id = q;
  WITH mine AS MATERIALIZED (
    SELECT t.id FROM unnest(ids, tokens, outcomes) AS asked (id, token, outcome)
    JOIN filao.message t ON t.id = asked.id AND t.token = asked.token
    WHERE asked.outcome = 'ack' AND t.state = 'leased' AND t.at > now
      AND t.grp IS NULL AND t.dedup_key IS NULL AND t.message_id IS NULL AND t.failures = 0
    ORDER BY t.id FOR UPDATE OF t
  ), gone AS (
    DELETE FROM filao.message t USING mine WHERE t.id = mine.id RETURNING t.id
  )
  SELECT coalesce(array_agg(gone.id), '{}') INTO acked FROM gone;  -- most acks, in one statement
  held := cardinality(acked);
  PERFORM filao.count(q, ARRAY['leased', 'acked'], ARRAY[-held, held]) WHERE held > 0;
  IF held = cardinality(ids) THEN
    RETURN;
  END IF;
  FOR i IN 1 .. cardinality(ids) LOOP
    CONTINUE WHEN ids[i] = ANY (acked);
    SELECT * INTO m FROM filao.message t WHERE t.id = ids[i] AND t.token = tokens[i] FOR UPDATE;
    IF NOT FOUND THEN
      RETURN NEXT i;
      CONTINUE;
    END IF;
    IF m.state <> 'leased' OR m.at <= now THEN
      PERFORM filao.count(q, ARRAY['late'], ARRAY[1]);
    END IF;
    CASE outcomes[i]
      WHEN 'ack' THEN
        DELETE FROM filao.message t WHERE t.id = m.id;
        PERFORM filao.count(q, ARRAY[m.state::text, 'acked'], ARRAY[-1, 1]);
        PERFORM filao.forget(m, now, later);
      WHEN 'nack' THEN
        PERFORM filao.count(q, ARRAY['nacked'], ARRAY[1]);
        PERFORM filao.record(m, 'nacked', coalesce(errors[i], ''), consumer, now);
        IF m.attempts >= rules.max_attempts THEN
          PERFORM filao.die(m, 'max_attempts', now, later);
        ELSE
          PERFORM filao.give_back(m, now + nullif(coalesce(delays[i], filao.backoff(rules, m.attempts)), 0), 0, now, later);
        END IF;
      WHEN 'release' THEN
        PERFORM filao.release(m, now, later);
      ELSE
        PERFORM filao.record(m, outcomes[i], coalesce(errors[i], ''), consumer, now);
        PERFORM filao.die(m, outcomes[i], now, later);
    END CASE;
  END LOOP;
END
$$;

-- Give a leased message back as if it had not been delivered.
CREATE OR REPLACE FUNCTION filao.release(m filao.message, now bigint, later boolean) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
  PERFORM filao.count(m.queue, ARRAY['released'], ARRAY[1]);
  UPDATE filao.message SET attempts = attempts - 1 WHERE id = m.id;
  PERFORM filao.give_back(m, NULL, 0, now, later);
END
$$;

-- Let leases end so many milliseconds from now; one that ran out but was not taken over runs again. Returns the places of
-- those that were lost. What its own consumer is settling meanwhile is not waited for: nobody else can take it.
CREATE OR REPLACE FUNCTION filao.extend(q integer, moment bigint, ids bigint[], tokens bigint[], lengths bigint[])
RETURNS SETOF integer
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
DECLARE
  now  bigint := coalesce(moment, filao.clock());
  m    filao.message;
  done bigint[];
  i    integer;
BEGIN
  WITH mine AS MATERIALIZED (
    SELECT t.id, asked.length FROM unnest(ids, tokens, lengths) AS asked (id, token, length)
    JOIN filao.message t ON t.id = asked.id AND t.token = asked.token
    WHERE t.state = 'leased' AND t.at > now
    ORDER BY t.id FOR UPDATE OF t SKIP LOCKED
  ), extended AS (
    UPDATE filao.message t SET at = now + mine.length FROM mine WHERE t.id = mine.id RETURNING t.id
  )
  SELECT coalesce(array_agg(extended.id), '{}') INTO done FROM extended;
  FOR i IN 1 .. cardinality(ids) LOOP
    CONTINUE WHEN ids[i] = ANY (done);
    SELECT * INTO m FROM filao.message t WHERE t.id = ids[i] AND t.token = tokens[i];
    IF NOT FOUND OR m.state = 'blocked' THEN  -- blocked: its group went on without it
      RETURN NEXT i;
      CONTINUE;
    END IF;
    IF m.grp IS NOT NULL THEN
      PERFORM pg_advisory_xact_lock(filao.group_key(q, m.grp));
    END IF;
    SELECT * INTO m FROM filao.message t WHERE t.id = ids[i] AND t.token = tokens[i] FOR UPDATE SKIP LOCKED;
    IF FOUND AND m.state = 'blocked' THEN
      RETURN NEXT i;
    ELSIF FOUND THEN
      PERFORM filao.count(q, ARRAY['late'], ARRAY[1]);
      UPDATE filao.message t SET state = 'leased', at = now + lengths[i] WHERE t.id = m.id;
      PERFORM filao.count_move(q, m.state, 'leased');
    END IF;
  END LOOP;
END
$$;

-- --- operators ---------------------------------------------------------------------------------------------------------

-- The number of the message with this public id.
CREATE OR REPLACE FUNCTION filao.number_of(q integer, wanted text) RETURNS bigint LANGUAGE sql VOLATILE AS $$
  SELECT coalesce(
    (SELECT m.id FROM filao.message m WHERE m.queue = q AND m.message_id = wanted),
    (SELECT (regexp_match(wanted, '^' || value || '-([0-9]{1,18})$'))[1]::bigint FROM filao.meta WHERE name = 'database')
  )
$$;

-- The next messages in these states, or of these ids, that an operator's command is about: locked; dead ones in order.
CREATE OR REPLACE FUNCTION filao.chosen(q integer, states filao.state[], ids text[], most integer)
RETURNS SETOF filao.message LANGUAGE plpgsql AS $$
DECLARE
  s     filao.state;
  found integer;
BEGIN
  IF ids IS NOT NULL THEN
    RETURN QUERY
      SELECT m.* FROM filao.message m
      WHERE m.id IN (SELECT filao.number_of(q, name) FROM unnest(ids) AS name) AND m.queue = q AND m.state = ANY (states)
      ORDER BY m.id LIMIT most FOR UPDATE;
    RETURN;
  END IF;
  FOREACH s IN ARRAY states LOOP  -- one by one, so that each is found through its own index
    RETURN QUERY EXECUTE format(
      'SELECT * FROM filao.message WHERE queue = $1 AND state = %L %s LIMIT $2 FOR UPDATE',
      s, CASE s WHEN 'dead' THEN 'ORDER BY id' WHEN 'blocked' THEN 'AND grp IS NOT NULL' END
    ) USING q, most;
    GET DIAGNOSTICS found = ROW_COUNT;
    most := most - found;
  END LOOP;
END
$$;

-- Give dead letters back with fresh attempts, each to its old place, and return how many there were.
CREATE OR REPLACE FUNCTION filao.redrive(
  q integer, moment bigint, ids text[], most integer, new_kind smallint, new_content bytea, new_headers text
) RETURNS integer
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
DECLARE
  now  bigint := coalesce(moment, filao.clock());
  m    filao.message;
  done integer := 0;
BEGIN
  FOR m IN SELECT * FROM filao.chosen(q, '{dead}', ids, most) LOOP
    UPDATE filao.message
    SET attempts = 0, reason = NULL, expires_at = NULL, kind = coalesce(new_kind, kind),
        content = coalesce(new_content, content), headers = coalesce(new_headers, headers)
    WHERE id = m.id;
    IF m.dedup_key IS NOT NULL THEN
      PERFORM filao.remember(q, 'k', m.dedup_key, filao.name_of(m.id, m.message_id), now);
    END IF;
    PERFORM filao.give_back(m, NULL, 0, now, false);
    done := done + 1;
  END LOOP;
  PERFORM filao.count(q, ARRAY['redriven'], ARRAY[done]);
  RETURN done;
END
$$;

-- Delete messages in these states; whoever holds one loses its lease. A purge starts afresh: what it removed may be sent
-- again at once.
CREATE OR REPLACE FUNCTION filao.remove(q integer, moment bigint, states filao.state[], ids text[], most integer)
RETURNS integer
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
DECLARE
  now  bigint := coalesce(moment, filao.clock());
  m    filao.message;
  done integer := 0;
BEGIN
  FOR m IN SELECT * FROM filao.chosen(q, states, ids, most) LOOP
    SELECT * INTO m FROM filao.message WHERE id = m.id;  -- another of its group may have moved it in this loop
    PERFORM filao.discard(m, CASE WHEN ids IS NULL THEN 'purged' ELSE 'cancelled' END, now);
    IF ids IS NULL AND (m.dedup_key IS NOT NULL OR m.message_id IS NOT NULL) THEN
      DELETE FROM filao.dedup d
      WHERE d.queue = q AND d.message = filao.name_of(m.id, m.message_id)
        AND ((d.kind = 'k' AND d.key = m.dedup_key) OR (d.kind = 'm' AND d.key = m.message_id));
    END IF;
    done := done + 1;
  END LOOP;
  RETURN done;
END
$$;

-- Give messages that were just stored, and came from elsewhere, their past. What is NULL among `reasons` waits.
CREATE OR REPLACE FUNCTION filao.amend(
  q integer, moment bigint, numbers bigint[], attempts integer[], failures integer[], sent bigint[], expires bigint[],
  reasons text[], died bigint[], dedup_keys text[]
) RETURNS void
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
#variable_conflict use_variable
DECLARE
  now bigint := coalesce(moment, filao.clock());
  m   filao.message;
BEGIN
  UPDATE filao.message AS s SET attempts = t.attempts, failures = t.failures, sent_at = t.sent, expires_at = t.expires
  FROM unnest(numbers, attempts, failures, sent, expires) AS t (number, attempts, failures, sent, expires)
  WHERE s.id = t.number;
  FOR i IN 1 .. cardinality(numbers) LOOP
    CONTINUE WHEN reasons[i] IS NULL;
    SELECT * INTO m FROM filao.message WHERE id = numbers[i];
    UPDATE filao.message SET state = 'dead', at = died[i], reason = reasons[i], dedup_key = dedup_keys[i] WHERE id = m.id;
    PERFORM filao.count_move(q, m.state, 'dead');
    PERFORM filao.arrange(q, m.grp, now, false);
  END LOOP;
END
$$;

-- Delete a queue that holds no message, with all that is remembered of it; returns how many it holds. The lock waits for
-- those who have read the queue's rules and are about to store something.
CREATE OR REPLACE FUNCTION filao.delete(q integer) RETURNS bigint
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
DECLARE
  held bigint;
BEGIN
  LOCK TABLE filao.queue IN ACCESS EXCLUSIVE MODE;
  SELECT count(*) INTO held FROM filao.message WHERE queue = q;
  IF held = 0 THEN
    DELETE FROM filao.dedup WHERE queue = q;
    DELETE FROM filao.halted WHERE queue = q;
    DELETE FROM filao.unarranged WHERE queue = q;
    DELETE FROM filao.waiting WHERE queue = q;
    DELETE FROM filao.counter WHERE queue = q;
    DELETE FROM filao.queue WHERE id = q;
  END IF;
  RETURN held;
END
$$;

-- Let a halted group go on.
CREATE OR REPLACE FUNCTION filao.resume_group(q integer, moment bigint, g text) RETURNS void
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
BEGIN
  DELETE FROM filao.halted WHERE queue = q AND grp = g;
  PERFORM filao.arrange(q, g, coalesce(moment, filao.clock()), false);
END
$$;

-- Create a queue or give it these rules; returns its number.
CREATE OR REPLACE FUNCTION filao.declare(wanted text, new_rules jsonb, moment bigint) RETURNS integer
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
DECLARE
  was     filao.queue;
  becomes filao.queue;
  g       text;
BEGIN
  SELECT * INTO was FROM filao.queue WHERE name = wanted;
  IF FOUND AND was.rules = new_rules THEN
    RETURN was.id;  -- most declarations, and no write
  END IF;
  INSERT INTO filao.queue (name, rules) VALUES (wanted, new_rules)
  ON CONFLICT (name) DO UPDATE SET rules = excluded.rules
  RETURNING * INTO becomes;
  IF was.skips_failed <> becomes.skips_failed OR was.halts_dead <> becomes.halts_dead THEN
    IF NOT becomes.halts_dead THEN
      DELETE FROM filao.halted WHERE queue = becomes.id;
    END IF;
    FOR g IN SELECT DISTINCT grp FROM filao.message WHERE queue = becomes.id AND grp IS NOT NULL LOOP
      PERFORM filao.arrange(becomes.id, g, coalesce(moment, filao.clock()), false);
    END LOOP;
  END IF;
  RETURN becomes.id;
END
$$;

-- --- processes ---------------------------------------------------------------------------------------------------------

-- Take over the leases of a process that died, or give back those of one that leaves; return how many there were.
CREATE OR REPLACE FUNCTION filao.strike_off(p integer, moment bigint, died boolean) RETURNS integer
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
DECLARE
  now  bigint := coalesce(moment, filao.clock());
  m    filao.message;
  q    integer;
  done integer := 0;
BEGIN
  FOR q IN SELECT id FROM filao.queue ORDER BY id LOOP
    FOR m IN
      SELECT * FROM filao.message
      WHERE queue = q AND state = 'leased' AND token BETWEEN p::bigint << 32 AND (p::bigint + 1 << 32) - 1
      ORDER BY id FOR UPDATE SKIP LOCKED
    LOOP
      IF died THEN
        PERFORM filao.lose(m, 'crashed', now);
      ELSE
        PERFORM filao.release(m, now, false);
      END IF;
      done := done + 1;
    END LOOP;
  END LOOP;
  DELETE FROM filao.waiting WHERE process = p;
  DELETE FROM filao.process WHERE id = p;
  RETURN done;
END
$$;

-- Forget old deduplication keys, and fold the counters of backends that are gone; true when there may be more to do.
CREATE OR REPLACE FUNCTION filao.tidy(moment bigint) RETURNS boolean
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
DECLARE
  forgotten bigint;
BEGIN
  WITH old AS (
    SELECT queue, kind, key FROM filao.dedup
    WHERE until <= coalesce(moment, filao.clock()) LIMIT 1000 FOR UPDATE SKIP LOCKED
  )
  DELETE FROM filao.dedup d USING old WHERE (d.queue, d.kind, d.key) = (old.queue, old.kind, old.key);
  GET DIAGNOSTICS forgotten = ROW_COUNT;
  IF pg_try_advisory_xact_lock(filao.group_key(0, 'tidy')) THEN
    DELETE FROM filao.process p -- behind a pooler nobody sees a process die
    WHERE NOT p.has_session AND p.started_at < coalesce(moment, filao.clock()) - 86400000 AND NOT EXISTS (
      SELECT FROM filao.message m WHERE m.state = 'leased' AND m.token >> 32 = p.id
    );
    WITH gone AS (
      DELETE FROM filao.counter c
      WHERE c.backend <> 0 AND NOT EXISTS (SELECT FROM pg_stat_activity a WHERE a.pid = c.backend)
      RETURNING c.queue, c.name, c.value
    )
    INSERT INTO filao.counter AS c (queue, backend, name, value)
    SELECT gone.queue, 0, gone.name, sum(gone.value) FROM gone GROUP BY 1, 3
    ON CONFLICT (queue, backend, name) DO UPDATE SET value = c.value + excluded.value;
  END IF;
  RETURN forgotten = 1000;
END
$$;
