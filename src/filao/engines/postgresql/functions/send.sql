-- Sending: room, deduplication, storing.

-- How many messages count towards max_length.
CREATE OR REPLACE FUNCTION filao.pending(q integer) RETURNS bigint LANGUAGE sql VOLATILE AS $$
  SELECT coalesce(sum(value), 0)::bigint
  FROM filao.counter
  WHERE queue = q AND name IN ('ready', 'delayed', 'leased', 'blocked')
$$;

-- How many messages of a queue could be dropped at most: a blocked one once those before it in its group are.
CREATE OR REPLACE FUNCTION filao.waiting(q integer) RETURNS bigint LANGUAGE sql VOLATILE AS $$
  SELECT coalesce(sum(value), 0)::bigint FROM filao.counter WHERE queue = q AND name IN ('ready', 'delayed', 'blocked')
$$;

-- Make the oldest waiting message a dead letter; false when there is none. One that a consumer is just claiming is
-- waited for; if it was claimed, the next is the oldest.
CREATE OR REPLACE FUNCTION filao.drop_oldest(q integer, now bigint, later boolean) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
  seen   filao.seen := CASE WHEN later THEN filao.nothing_seen() ELSE filao.look(q, filao.seen(q)) END;
  oldest bigint;
  now_is filao.state;
BEGIN
  LOOP
    seen := filao.look_at_ready(q, seen);
    oldest := coalesce((SELECT min(place) FROM unnest(seen.floors) AS place), (
      SELECT id FROM filao.message WHERE queue = q AND state = 'delayed' AND at >= seen.delayed ORDER BY at LIMIT 1
    ));
    IF oldest IS NULL THEN
      RETURN false;
    END IF;
    SELECT state INTO now_is FROM filao.message WHERE id = oldest FOR UPDATE;
    EXIT WHEN now_is IN ('ready', 'delayed');
  END LOOP;
  IF NOT later THEN  -- a user's transaction may be prepared, and undone when the session has gone on
    PERFORM filao.remember_seen(q, seen);
  END IF;
  PERFORM filao.record(
    q, ARRAY[oldest], 'overflow', ARRAY['the queue was full and its rule is to drop the oldest'], NULL, now
  );
  PERFORM filao.die(q, ARRAY[oldest], 'overflow', now, later);
  RETURN true;
END
$$;

-- Drop so many of the oldest, or none, and return false: others may claim some while they are counted.
CREATE OR REPLACE FUNCTION filao.drop_some(q integer, surplus bigint, now bigint, later boolean) RETURNS boolean
LANGUAGE plpgsql AS $$
BEGIN
  FOR i IN 1 .. surplus LOOP
    IF NOT filao.drop_oldest(q, now, later) THEN
      RAISE SQLSTATE 'FILAO';  -- undoes what this block did
    END IF;
  END LOOP;
  RETURN true;
EXCEPTION
  WHEN SQLSTATE 'FILAO' THEN
    RETURN false;
END
$$;

-- Make room for so many new messages, or return false, and nothing was dropped. What has expired takes no room.
CREATE OR REPLACE FUNCTION filao.has_room(rules filao.queue, new bigint, now bigint, later boolean) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
  surplus bigint := filao.pending(rules.id) + new - rules.max_length;
  seen    filao.seen;
BEGIN
  IF new = 0 OR surplus <= 0 THEN
    RETURN true;
  END IF;
  seen := filao.nothing_seen();
  IF NOT later THEN  -- see drop_oldest
    seen := filao.look_at_times(rules.id, filao.look(rules.id, filao.seen(rules.id)), now);
    PERFORM filao.remember_seen(rules.id, seen);
  END IF;
  surplus := surplus - filao.expire_some(rules.id, surplus, now, later, seen.expiring);
  IF surplus <= 0 THEN
    RETURN true;
  ELSIF NOT rules.drops_oldest OR new > rules.max_length OR surplus > filao.waiting(rules.id) THEN
    RETURN false;
  END IF;
  IF NOT later THEN
    PERFORM filao.arrange_noted(rules.id, now);  -- or what may be dropped counts as blocked
  END IF;
  IF surplus = 1 THEN  -- most sends, for which there is nothing to undo
    RETURN filao.drop_oldest(rules.id, now, later);
  END IF;
  RETURN filao.drop_some(rules.id, surplus, now, later);
END
$$;

-- Claim the keys of some sends' drafts (`chosen` NULL: of all), in order, and return the places of duplicates.
CREATE OR REPLACE FUNCTION filao.claim(
  q integer, now bigint, later boolean, salt bigint, numbers bigint[], chosen integer[], ops integer[],
  dedup_keys text[],
  message_ids text[]
) RETURNS TABLE (place integer, came_first text) LANGUAGE plpgsql AS $$
DECLARE
  prefix text := filao.prefix(salt);
  n      integer;
BEGIN
  FOR n IN 1 .. cardinality(ops) LOOP
    CONTINUE WHEN ops[n] <> ALL (chosen);
    came_first := filao.claim_keys(
      q, dedup_keys[n], message_ids[n], coalesce(message_ids[n], prefix || numbers[n]::text), now, later
    );
    IF came_first IS NOT NULL THEN
      place := n;
      RETURN NEXT;
    END IF;
  END LOOP;
END
$$;

-- Store the drafts of some sends (`chosen` NULL: of all), but for duplicates.
CREATE OR REPLACE FUNCTION filao.store(
  rules filao.queue, now bigint, later boolean, salt bigint, numbers bigint[], chosen integer[], twice integer[],
  ops integer[], kinds smallint[], contents bytea[], headers text[], delays bigint[], priorities integer[],
  groups text[],
  dedup_keys text[], ttls bigint[], message_ids text[]
) RETURNS void LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
  states bigint[];
  wanted bigint := cardinality(contents);
  noted  bigint;
BEGIN
  WITH stored AS (
    INSERT INTO filao.message (id, queue, state, kind, priority, at, sent_at, expires_at, grp, dedup_key, message_id,
                               headers, content, salt)
    SELECT numbers[n], rules.id,
           CASE WHEN coalesce(delays[n], 0) > 0 AND (groups[n] IS NULL OR rules.skips_failed) THEN 'delayed'
                WHEN groups[n] IS NULL THEN 'ready' ELSE 'blocked' END::filao.state,
           kinds[n], coalesce(priorities[n], 0), now + coalesce(delays[n], 0), now, now + coalesce(ttls[n], rules.ttl),
           groups[n], dedup_keys[n], message_ids[n], headers[n], content, store.salt
    FROM unnest(contents) WITH ORDINALITY AS given (content, n)
    WHERE (chosen IS NULL OR ops[n] = ANY (chosen)) AND n <> ALL (twice)
    ORDER BY n
    RETURNING state
  )
  SELECT ARRAY[count(*), count(*) FILTER (WHERE state = 'ready'), count(*) FILTER (WHERE state = 'delayed'),
               count(*) FILTER (WHERE state = 'blocked'), cardinality(twice)]
  INTO states FROM stored;
  IF chosen IS NOT NULL THEN  -- else all, as mostly
    wanted := (SELECT count(*) FROM unnest(ops) AS op WHERE op = ANY (chosen));
  END IF;
  IF states[1] < wanted - cardinality(twice) THEN
    PERFORM filao.skipped('filao.message');
  END IF;
  PERFORM filao.count(rules.id, ARRAY['sent', 'ready', 'delayed', 'blocked', 'duplicates'], states);
  IF rules.kept_for IS NOT NULL THEN
    INSERT INTO filao.event (queue, message, at, until, what, attempt, who, detail)
    SELECT rules.name, coalesce(message_ids[n], filao.prefix(store.salt) || numbers[n]::text), store.now,
           store.now + rules.kept_for, 'sent', 0, filao.caller(), ''
    FROM generate_series(1, cardinality(contents)) AS n
    WHERE (chosen IS NULL OR ops[n] = ANY (chosen)) AND n <> ALL (twice)
    ORDER BY n;
    GET DIAGNOSTICS noted = ROW_COUNT;
    IF noted < states[1] THEN
      PERFORM filao.skipped('filao.event');
    END IF;
  END IF;
  IF groups IS NOT NULL THEN
    PERFORM filao.arrange_all(rules.id, ARRAY(
      SELECT DISTINCT given.g FROM unnest(groups, ops) AS given (g, op)
      WHERE given.g IS NOT NULL AND (chosen IS NULL OR given.op = ANY (chosen))
    ), now, later, (SELECT min(number) FROM unnest(numbers) AS number));
  END IF;
END
$$;

-- Store drafts. `ops` tells which belong to one send: all of its drafts are stored, or none. An array that holds
-- nothing but defaults may be NULL. Durations are milliseconds. Returns a row for each draft: its number, or the id of
-- the message that came first; or one row with a `problem` for a whole send: its `number` is then how many of its
-- drafts are new.
--
-- The keys are claimed before the messages are counted, so that a queue's limit counts what is new, whatever keys the
-- drafts of one send share with each other or with what is there; those of a send that is refused are given up again.
--
-- Invariant: between the look at a queue's limit and the commit no other sends to it: the lock of its limit is held. It
-- is not that of its row, which an operator needs to pause it or to declare it anew.
CREATE OR REPLACE FUNCTION filao.send(
  q integer, moment bigint, later boolean, salt bigint, ops integer[], kinds smallint[], contents bytea[],
  headers text[],
  delays bigint[], priorities integer[], groups text[], dedup_keys text[], ttls bigint[], message_ids text[]
) RETURNS TABLE (place integer, op integer, number bigint, came_first text, problem text, detail bigint)
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
#variable_conflict use_column
DECLARE
  now      bigint := filao.now(moment);
  isolated boolean := current_setting('transaction_isolation') <> 'read committed';
  numbers  bigint[] := ARRAY(SELECT nextval('filao.number') FROM generate_series(1, cardinality(contents)));
  rules    filao.queue;
  chosen   integer[];  -- the sends that are not too large; NULL: all
  parts    integer[];  -- those that are stored together
  twice    integer[];
  new      bigint;  -- how many messages, for a queue that has a limit
  i        integer;
BEGIN
  IF message_ids IS NOT NULL AND EXISTS (SELECT FROM unnest(message_ids) AS m WHERE m ~ '^[0-9a-f]{16}-[0-9]+$')
     AND NOT filao.is_owner() THEN  -- who moves messages from another engine
    RAISE insufficient_privilege USING MESSAGE = 'a message_id that looks like one of Filao''s own';
  END IF;
  PERFORM pg_advisory_xact_lock_shared(1718184290, q);  -- see filao.delete
  SELECT * INTO STRICT rules FROM filao.queue WHERE id = q;
  IF coalesce(current_setting('filao.moves', true), '') = 'yes' AND filao.is_owner() THEN
    rules.max_length := NULL;  -- what was confirmed to its sender elsewhere is kept ...
    rules.body_max := NULL;  -- ... whatever room there is, and however large it is
  END IF;
  IF isolated THEN  -- its snapshot may be older than a deletion, which this then finds
    PERFORM FROM filao.queue WHERE id = q FOR KEY SHARE;
  END IF;
  IF (SELECT max(length(content)) FROM unnest(contents) AS given (content)) > rules.body_max THEN
    chosen := ARRAY(
      SELECT ops[n] FROM unnest(contents) WITH ORDINALITY AS given (content, n)
      GROUP BY 1 HAVING max(length(content)) <= rules.body_max ORDER BY 1
    );
    RETURN QUERY
      SELECT 0, ops[n], NULL::bigint, NULL::text, 'too large', max(length(content))::bigint
      FROM unnest(contents) WITH ORDINALITY AS given (content, n)
      WHERE length(content) > rules.body_max
      GROUP BY 2;
  ELSIF rules.max_length IS NOT NULL THEN
    chosen := ARRAY(SELECT DISTINCT this FROM unnest(ops) AS this ORDER BY this);
  END IF;
  IF rules.max_length IS NOT NULL AND isolated THEN  -- it does not see what others have sent since it began
    RETURN QUERY SELECT 0, this, NULL::bigint, NULL::text, 'isolated', NULL::bigint FROM unnest(chosen) AS this;
    RETURN;
  ELSIF rules.max_length IS NOT NULL THEN
    PERFORM pg_advisory_xact_lock(1718184291, q);  -- one sender at a time, so that the limit is exact
  END IF;
  FOR this IN 1 .. CASE WHEN rules.max_length IS NULL THEN 1 ELSE cardinality(chosen) END LOOP
    parts := CASE WHEN rules.max_length IS NULL THEN chosen ELSE chosen[this:this] END;
    twice := '{}';
    IF dedup_keys IS NOT NULL OR message_ids IS NOT NULL THEN
      FOR place, came_first IN
        SELECT c.place, c.came_first
        FROM filao.claim(q, now, later, salt, numbers, parts, ops, dedup_keys, message_ids) AS c
      LOOP
        twice := twice || place;
        op := ops[place]; number := NULL; problem := NULL; detail := NULL;
        RETURN NEXT;
      END LOOP;
    END IF;
    new := cardinality(array_positions(ops, parts[1])) - cardinality(twice);
    IF rules.max_length IS NULL OR filao.has_room(rules, new, now, later) THEN
      PERFORM filao.store(
        rules, now, later, salt, numbers, parts, twice, ops, kinds, contents, headers, delays, priorities, groups,
        dedup_keys, ttls, message_ids
      );
      RETURN QUERY
        SELECT n, ops[n], numbers[n], NULL::text, NULL::text, NULL::bigint
        FROM generate_series(1, cardinality(contents)) AS n
        WHERE (parts IS NULL OR ops[n] = ANY (parts)) AND n <> ALL (twice);
    ELSE
      FOREACH i IN ARRAY array_positions(ops, parts[1]) LOOP
        CONTINUE WHEN i = ANY (twice);
        PERFORM filao.forget_keys(
          q, dedup_keys[i], message_ids[i], coalesce(message_ids[i], filao.prefix(salt) || numbers[i]::text)
        );
      END LOOP;
      PERFORM filao.count(q, ARRAY['refused'], ARRAY[cardinality(array_positions(ops, parts[1]))]);
      place := 0; op := parts[1]; number := new; came_first := NULL; problem := 'full'; detail := filao.pending(q);
      RETURN NEXT;
    END IF;
  END LOOP;
END
$$;
