-- Processes that receive, and what is cleared up behind them.

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
    WITH old AS MATERIALIZED ( -- a user's transaction may still be counting in one
      SELECT c.queue, c.backend, c.slot, c.name FROM filao.counter c
      WHERE c.backend <> 0 AND (c.slot < (filao.clock() >> 13) - 1
                                OR NOT EXISTS (SELECT FROM pg_stat_activity a WHERE a.pid = c.backend))
      FOR UPDATE SKIP LOCKED
    ), gone AS (
      DELETE FROM filao.counter c USING old
      WHERE (c.queue, c.backend, c.slot, c.name) = (old.queue, old.backend, old.slot, old.name)
      RETURNING c.queue, c.name, c.value
    )
    INSERT INTO filao.counter AS c (queue, backend, slot, name, value)
    SELECT gone.queue, 0, 0, gone.name, sum(gone.value) FROM gone GROUP BY 1, 4
    ON CONFLICT (queue, backend, slot, name) DO UPDATE SET value = c.value + excluded.value;
  END IF;
  RETURN forgotten = 1000;
END
$$;
