-- Sending: room, deduplication, storing.

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
