-- What operators do.

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
