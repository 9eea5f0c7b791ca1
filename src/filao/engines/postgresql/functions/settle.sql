-- Settling and extending, each with the lease's token in the statement that writes.
--
-- Messages are found by their ids, whatever the planner believes of the table: a join with it is written as LATERAL or
-- with an array, and a state is compared with IS NOT DISTINCT FROM where `=` would let the plan walk through an index
-- of states.

-- How long a message waits after its nth failed attempt: see filao.queue.Backoff.
CREATE OR REPLACE FUNCTION filao.backoff(rules filao.queue, attempt integer) RETURNS bigint LANGUAGE sql VOLATILE AS $$
  SELECT (least(rules.ceiling, rules.first_delay * power(rules.factor, least(attempt - 1, 64)))
          * (1 - rules.jitter * random()))::bigint
$$;

-- End leases, each as its outcome says: ack, nack, reject, malformed or release. Returns the places of those that were
-- lost.
--
-- Invariant: `done` are the places that are settled. A row is deleted by its id and its token together, or changed
-- after it was locked by both, so that nobody else has received it; of two outcomes for one lease the first is done.
CREATE OR REPLACE FUNCTION filao.settle(
  q integer, moment bigint, later boolean, consumer text, ids bigint[], tokens bigint[], outcomes text[], errors text[],
  delays bigint[]
) RETURNS SETOF integer
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
  now    bigint := filao.now(moment);
  rules  filao.queue;
  acked  bigint[];  -- ids, in order, for `width_bucket` to find; their tokens and places
  proofs bigint[];
  places bigint[];
  done   bigint[] := '{}';  -- places
  groups text[];
  held   bigint := 0;
  fate   record;
BEGIN
  SELECT * INTO STRICT rules FROM filao.queue WHERE id = q;
  IF rules.kept_for IS NULL THEN  -- else each is noted down, below
    SELECT array_agg(id ORDER BY id), array_agg(token ORDER BY id), array_agg(place ORDER BY id)
    INTO acked, proofs, places
    FROM (  -- of two for one message the first
      SELECT DISTINCT ON (id) *
      FROM unnest(ids, tokens, outcomes) WITH ORDINALITY AS given (id, token, outcome, place) ORDER BY id, place
    ) AS asked
    WHERE outcome = 'ack';
    WITH gone AS (  -- most acks, in one statement
      DELETE FROM filao.message t
      WHERE t.id = ANY (acked) AND t.token = proofs[width_bucket(t.id, acked)]
        AND t.state IS NOT DISTINCT FROM 'leased' AND t.at > now
        AND t.dedup_key IS NULL AND t.message_id IS NULL AND t.failures = 0
      RETURNING t.id, t.grp
    )
    SELECT coalesce(array_agg(places[width_bucket(gone.id, acked)]), '{}'), count(*),
           array_agg(DISTINCT gone.grp) FILTER (WHERE gone.grp IS NOT NULL)
    INTO done, held, groups
    FROM gone;
  END IF;
  PERFORM filao.count(q, ARRAY['leased', 'acked'], ARRAY[-held, held]) WHERE held > 0;
  IF groups IS NOT NULL THEN
    PERFORM filao.arrange_all(q, groups, now, later);
  END IF;
  IF cardinality(done) = cardinality(ids) THEN
    RETURN;
  END IF;
  FOR fate IN  -- the others, by what becomes of them; of two that end one lease the first does
    WITH mine AS MATERIALIZED (
      SELECT asked.*, held.attempts, held.is_late
      FROM (
        SELECT DISTINCT ON (id, token) *
        FROM unnest(ids, tokens, outcomes) WITH ORDINALITY AS given (id, token, outcome, place)
        WHERE place <> ALL (done) ORDER BY id, token, place
      ) AS asked, LATERAL (
        SELECT t.attempts, t.state <> 'leased' OR t.at <= now AS is_late FROM filao.message t
        WHERE t.id = asked.id AND t.token = asked.token FOR UPDATE
      ) AS held
    )
    SELECT CASE WHEN mine.outcome = 'nack' AND mine.attempts >= rules.max_attempts THEN 'max_attempts'
                ELSE mine.outcome END AS what,
           array_agg(mine.id ORDER BY mine.place) AS ids, array_agg(mine.place ORDER BY mine.place) AS places,
           array_agg(errors[mine.place] ORDER BY mine.place) AS errors,
           array_agg(now + nullif(coalesce(
             delays[mine.place], CASE mine.outcome WHEN 'nack' THEN filao.backoff(rules, mine.attempts) END
           ), 0) ORDER BY mine.place) AS dues,
           count(*) AS count, count(*) FILTER (WHERE mine.is_late) AS late
    FROM mine GROUP BY 1
  LOOP
    done := done || fate.places;
    PERFORM filao.count(q, ARRAY['late'], ARRAY[fate.late]) WHERE fate.late > 0;
    CASE fate.what
      WHEN 'ack' THEN
        PERFORM filao.note(q, fate.ids, 'acked', consumer, NULL, now);
        PERFORM filao.discard(q, fate.ids, 'acked', now, later);
      WHEN 'release' THEN
        PERFORM filao.note(q, fate.ids, 'released', consumer, NULL, now);
        PERFORM filao.release(q, fate.ids, fate.dues, now, later);
      WHEN 'nack', 'max_attempts' THEN
        PERFORM filao.count(q, ARRAY['nacked'], ARRAY[fate.count]);
        PERFORM filao.record(
          q, fate.ids, 'nacked', fate.errors, array_fill(consumer, ARRAY[cardinality(fate.ids)]), now
        );
        IF fate.what = 'nack' THEN
          PERFORM filao.give_back(q, fate.ids, fate.dues, false, 1, 0, now, later);
        ELSE
          PERFORM filao.die(q, fate.ids, 'max_attempts', now, later);
        END IF;
      ELSE
        PERFORM filao.record(
          q, fate.ids, fate.what, fate.errors, array_fill(consumer, ARRAY[cardinality(fate.ids)]), now
        );
        PERFORM filao.die(q, fate.ids, fate.what, now, later);
    END CASE;
  END LOOP;
  RETURN QUERY
    SELECT place::integer FROM unnest(ids) WITH ORDINALITY AS given (id, place)
    WHERE place <> ALL (done) ORDER BY place;
END
$$;

-- Give leased messages back as if they had not been delivered, ready now or delayed until their `dues`.
CREATE OR REPLACE FUNCTION filao.release(q integer, ids bigint[], dues bigint[], now bigint, later boolean) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
  PERFORM filao.count(q, ARRAY['released'], ARRAY[cardinality(ids)]);
  PERFORM filao.give_back(q, ids, dues, false, 0, -1, now, later);
END
$$;

CREATE OR REPLACE FUNCTION filao.note_extended(m filao.message, length bigint, now bigint) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
  PERFORM filao.note(m.queue, ARRAY[m.id], 'extended', filao.process_name((m.token >> 32)::integer),
                     ARRAY[(length / 1000.0::float8)::text], now);
END
$$;

-- Let leases end so many milliseconds from now; one that ran out but was not taken over runs again. Returns the places
-- of those that were lost. What its own consumer is settling meanwhile is not waited for, unless it ran out: until then
-- nobody else can take it.
CREATE OR REPLACE FUNCTION filao.extend(q integer, moment bigint, ids bigint[], tokens bigint[], lengths bigint[])
RETURNS SETOF integer
LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
DECLARE
  now  bigint := filao.now(moment);
  m    filao.message;
  done bigint[];  -- places
  notes boolean := (SELECT kept_for IS NOT NULL FROM filao.queue WHERE id = q);
  i    integer;
BEGIN
  WITH mine AS MATERIALIZED (
    SELECT held.id, asked.length
    FROM (  -- of two for one lease the last
      SELECT DISTINCT ON (id, token) *
      FROM unnest(ids, tokens, lengths) WITH ORDINALITY AS given (id, token, length, place)
      ORDER BY id, token, place DESC
    ) AS asked, LATERAL (
      SELECT t.id FROM filao.message t
      WHERE t.id = asked.id AND t.token = asked.token AND t.state IS NOT DISTINCT FROM 'leased' AND t.at > now
      FOR UPDATE SKIP LOCKED
    ) AS held
  ), extended AS (
    UPDATE filao.message t SET (at, moved_in) = (
      SELECT now + mine.length, filao.news_of(mine.length) FROM mine WHERE mine.id = t.id
    )
    WHERE t.id = ANY (ARRAY(SELECT mine.id FROM mine)) RETURNING t.id, t.token
  )
  SELECT coalesce(array_agg(place), '{}') INTO done
  FROM unnest(ids, tokens) WITH ORDINALITY AS given (id, token, place) JOIN extended USING (id, token);
  FOR i IN 1 .. cardinality(ids) LOOP
    CONTINUE WHEN i = ANY (done) AND NOT notes;
    SELECT * INTO m FROM filao.message t WHERE t.id = ids[i] AND t.token = tokens[i];
    IF i = ANY (done) THEN
      PERFORM filao.note_extended(m, lengths[i], now);
      CONTINUE;
    ELSIF NOT FOUND OR m.state = 'blocked' THEN  -- blocked: its group went on without it
      RETURN NEXT i;
      CONTINUE;
    END IF;
    IF m.grp IS NOT NULL THEN
      PERFORM pg_advisory_xact_lock(filao.group_key(q, m.grp));
    END IF;
    IF m.at > now THEN
      SELECT * INTO m FROM filao.message t WHERE t.id = ids[i] AND t.token = tokens[i] FOR UPDATE SKIP LOCKED;
      CONTINUE WHEN NOT FOUND;
    ELSE  -- the transaction that has locked it may be taking it
      SELECT * INTO m FROM filao.message t WHERE t.id = ids[i] AND t.token = tokens[i] FOR UPDATE;
    END IF;
    IF NOT FOUND OR m.state = 'blocked' THEN
      RETURN NEXT i;
    ELSE
      PERFORM filao.count(q, ARRAY['late'], ARRAY[1]);
      UPDATE filao.message t SET state = 'leased', at = now + lengths[i], moved_in = filao.news_of(lengths[i])
      WHERE t.id = m.id;
      IF NOT FOUND THEN
        PERFORM filao.skipped('filao.message');
      END IF;
      PERFORM filao.count_move(q, m.state, 'leased');
      PERFORM filao.note_extended(m, lengths[i], now);
    END IF;
  END LOOP;
END
$$;
