-- What there is, by state. It costs the same at any depth, and under an old transaction: what may be looked for from a
-- floor is (see seen.sql), for dead rows lie below it. Of leases, which no one nacks back, the floor is the time. Dead
-- letters have none: only an operator takes them away.

-- Since when the oldest of each state has been there: when it was sent; of delayed ones, since when the first was due.
-- NULL: there is none. `holding` are the processes that hold the first 1,000 leases, once for each; `waiting` those
-- that wait. Of priorities the 512 highest are looked at. What is counted as none is not looked for.
CREATE OR REPLACE FUNCTION filao.ages(
  q integer, moment bigint, counted jsonb, OUT now bigint, OUT since_ready bigint, OUT since_delayed bigint,
  OUT since_leased bigint, OUT since_blocked bigint, OUT since_dead bigint, OUT holding integer[], OUT waiting integer[]
) LANGUAGE plpgsql SET enable_seqscan = off SET jit = off AS $$
DECLARE
  most  CONSTANT integer := 1000;  -- leases and places on the waiting list: a millisecond
  seen  filao.seen;
  first bigint := filao.first_waiting(q);
BEGIN
  now := filao.now(moment);
  seen := filao.look_at_times(q, filao.look(q, filao.seen(q)), now, ahead => true);
  IF (counted ->> 'ready')::bigint > 0 THEN
    seen := filao.look_at_ready(q, seen, 512);
    SELECT sent_at INTO since_ready FROM filao.message WHERE id = (SELECT min(place) FROM unnest(seen.floors) AS place);
  END IF;
  IF seen.delayed <= now AND (counted ->> 'delayed')::bigint > 0 THEN
    since_delayed := seen.delayed;
  END IF;
  IF (counted ->> 'blocked')::bigint > 0 THEN
    seen.blocked := (SELECT id FROM filao.message
                     WHERE queue = q AND state = 'blocked' AND id >= seen.blocked ORDER BY id LIMIT 1);
    SELECT sent_at INTO since_blocked FROM filao.message WHERE id = seen.blocked;
  END IF;
  IF (counted ->> 'dead')::bigint > 0 THEN
    SELECT sent_at INTO since_dead FROM filao.message WHERE queue = q AND state = 'dead' ORDER BY id LIMIT 1;
  END IF;
  IF (counted ->> 'leased')::bigint > 0 THEN
    SELECT min(l.sent_at), array_agg((l.token >> 32)::integer) INTO since_leased, holding
    FROM (SELECT sent_at, token FROM filao.message
          WHERE queue = q AND state = 'leased' AND at >= least(seen.leased, now) ORDER BY at LIMIT most) AS l;
  END IF;
  PERFORM filao.remember_seen(q, seen);
  SELECT array_agg(DISTINCT w.process) INTO waiting
  FROM (SELECT process FROM filao.waiting
        WHERE queue = q AND since >= first ORDER BY queue, since LIMIT most) AS w;
END
$$;
