package store_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"lorayard/internal/store"
	"lorayard/internal/storetest"
)

// seedRights gives two users a row in every table that the app sees, and
// returns the first of them and their rows by table.
func seedRights(t *testing.T, db *storetest.DB) (a string, rows map[string][2]string) {
	t.Helper()
	rows = map[string][2]string{}
	var users [2]string
	for i := range users {
		u := db.User()
		users[i] = u
		set := db.Dataset(u)
		id := db.Job(u, set)
		for table, row := range map[string]string{
			"datasets":        set,
			"training_jobs":   id,
			"metrics_points":  db.Text(`INSERT INTO metrics_points (job_id, epoch, step, training_loss, learning_rate) VALUES ($1, 1, 1, 1, 1e-4) RETURNING id`, id),
			"model_artifacts": db.Text(`INSERT INTO model_artifacts (user_id, job_id, dataset_id, name) VALUES ($1, $2, $3, 'x') RETURNING id`, u, id, set),
			"cost_records":    db.Text(`INSERT INTO cost_records (user_id, job_id, cost_type, amount, billing_period) VALUES ($1, $2, 'compute', 1, '2026-11-01') RETURNING id`, u, id),
			"notifications":   db.Text(`INSERT INTO notifications (user_id, type, title, message) VALUES ($1, 'x', 'x', 'x') RETURNING id`, u),
			"checkpoints":     db.Text(`INSERT INTO checkpoints (user_id, job_id, attempt, step, epoch, bucket, path, size, manifest_sha256, files) VALUES ($1, $2, 1, 1, 1, 'b', 'p', 1, 'x', '[]') RETURNING id`, u, id),
			"job_logs":        db.Text(`INSERT INTO job_logs (user_id, job_id, attempt, seq, timestamp, level, message) VALUES ($1, $2, 1, 1, now(), 'info', 'x') RETURNING id`, u, id),
		} {
			pair := rows[table]
			pair[i] = row
			rows[table] = pair
		}
	}
	return users[0], rows
}

func TestADataSetCannotPointAtAnothersFile(t *testing.T) {
	db := storetest.New(t)
	a, b := db.User(), db.User()
	for _, c := range []struct {
		bucket, path string
		ok           bool
	}{
		{"lora-datasets", a + "/x/train.jsonl", true},
		{"training-files", "5f0e/training.jsonl", true},
		{"lora-datasets", b + "/x/train.jsonl", false},
		{"lora-datasets", a + "/../" + b + "/train.jsonl", false},
		{"lora-datasets", a + "//train.jsonl", false},
		{"lora-datasets", a, false},
		{"lora-models", a + "/x/adapter.safetensors", false},
		{"training-files", "../lora-models/x", false},
	} {
		for verb, sql := range map[string]string{
			"insert": `INSERT INTO datasets (user_id, name, file_name, storage_bucket, storage_path) VALUES ($1, 'x', 'x', $2, $3)`,
			"update": `UPDATE datasets SET storage_bucket = $2, storage_path = $3 WHERE user_id = $1`,
		} {
			if verb == "update" {
				db.Dataset(a)
				db.Exec(`DELETE FROM datasets WHERE id <> (SELECT id FROM datasets LIMIT 1)`)
			}
			err := db.As(a, func(tx pgx.Tx) error {
				if _, err := tx.Exec(t.Context(), sql, a, c.bucket, c.path); err != nil {
					return err
				}
				return tx.Rollback(t.Context())
			})
			if errors.Is(err, pgx.ErrTxClosed) {
				err = nil
			}
			if pg, denied := errors.AsType[*pgconn.PgError](err); (err == nil) != c.ok || err != nil && (!denied || pg.Code != "42501") {
				t.Errorf("%s of %s/%s: %v", verb, c.bucket, c.path, err)
			}
		}
	}
}

func TestJobsThatNobodyLookedAt(t *testing.T) {
	db := storetest.New(t)
	u := db.User()
	set := db.Dataset(u)
	id := db.Job(u, set)
	if err := db.As(u, func(tx pgx.Tx) error { // as the app cancels
		_, err := tx.Exec(t.Context(), `UPDATE training_jobs SET status = 'cancelled', completed_at = now(), final_cost = 9 WHERE id = $1`, id)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	for want := 1; want >= 0; want-- {
		if ids, err := db.Store.SettleCancelled(t.Context()); err != nil || len(ids) != want {
			t.Errorf("settled %v, %v, want %d", ids, err, want)
		}
	}
	if got := db.Text(`SELECT t.status || ' ' || t.final_cost || ' ' || j.state FROM training_jobs t JOIN lorayard.jobs j ON j.job_id = t.id`); got != "cancelled 0.00 settled" {
		t.Errorf("the job is %s", got)
	}
	storetest.Check(t, db.Pool)

	if err := db.Store.CheckAlone(t.Context()); err != nil {
		t.Error(err)
	}
	other := db.Job(u, set)
	db.Exec(`UPDATE training_jobs SET status = 'running', external_job_id = 'rp-77' WHERE id = $1`, other)
	if err := db.Store.CheckAlone(t.Context()); err == nil || !strings.Contains(err.Error(), "rp-77") {
		t.Errorf("another writer passed: %v", err)
	}
}

func TestAnAgentIdBelongsToOneLogin(t *testing.T) {
	db := storetest.New(t)
	register(t, db, agent("a", 1))
	db.Exec(`UPDATE lorayard.agents SET login = 'gpu_host_7', lease_until = now() - interval '1 hour'`)
	_, err := db.Store.Register(t.Context(), agent("a", 2), ttl, nil)
	if !errors.Is(err, store.ErrInUse) || !strings.Contains(err.Error(), "gpu_host_7") {
		t.Errorf("another login took the id: %v", err)
	}
	if err := db.Store.Forget(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	register(t, db, agent("a", 2))
}

// who is a role, and the user whose JWT it carries.
type who struct{ name, role, user string }

// try runs f as somebody and takes everything back.
func try(t *testing.T, db *storetest.DB, w who, f func(tx pgx.Tx) error) error {
	t.Helper()
	undo := errors.New("undo")
	err := pgx.BeginFunc(context.Background(), db.Pool, func(tx pgx.Tx) error {
		if w.user != "" {
			if _, err := tx.Exec(context.Background(), `SELECT set_config('request.jwt.claims', json_build_object('sub', $1::text, 'role', $2::text)::text, true)`, w.user, w.role); err != nil {
				return err
			}
		}
		if _, err := tx.Exec(context.Background(), `SET LOCAL ROLE `+pgx.Identifier{w.role}.Sanitize()); err != nil {
			t.Fatal(err)
		}
		if err := f(tx); err != nil {
			return err
		}
		return undo
	})
	if errors.Is(err, undo) {
		return nil
	}
	return err
}

// reach says whose rows something reaches: own (user A's), all, none, or "-"
// where it is denied. An error other than a denial comes after the rights.
func reach(results [2]struct {
	rows int64
	err  error
},
) string {
	var hit [2]bool
	denied := 0
	for i, r := range results {
		pg, ok := errors.AsType[*pgconn.PgError](r.err)
		switch {
		case ok && pg.Code == "42501":
			denied++
		case r.err != nil:
			hit[i] = true
		default:
			hit[i] = r.rows > 0
		}
	}
	switch {
	case hit == [2]bool{true, true}:
		return "all"
	case hit[0]:
		return "own"
	case hit[1]:
		return "ANOTHER'S"
	case denied == 2:
		return "-"
	}
	return "none"
}

// TestRights compares who may do what to every table with testdata/rights.txt.
// It is made of the catalogue: a table that nobody thought of is a difference.
// UPDATE_GOLDEN=1 writes the file anew; then read the difference.
func TestRights(t *testing.T) {
	db := storetest.New(t)
	a, rows := seedRights(t, db)
	people := []who{{"anon", "anon", ""}, {"user", "authenticated", a}, {"agent", "lorayard_agent", ""}, {"dispatcher", "lorayard_dispatcher", ""}, {"observer", "lorayard_observer", ""}}
	ctx := t.Context()
	cursor, err := db.Pool.Query(ctx, `SELECT n.nspname || '.' || c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		WHERE n.nspname IN ('public', 'lorayard', 'lorayard_views') AND c.relkind IN ('r', 'p', 'v', 'm', 'f') ORDER BY n.nspname DESC, c.relname`)
	if err != nil {
		t.Fatal(err)
	}
	tables, err := pgx.CollectRows(cursor, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for _, table := range tables {
		_, name, _ := strings.Cut(table, ".")
		pair, seeded := rows[name]
		seeded = seeded && strings.HasPrefix(table, "public.")
		if !seeded && strings.HasPrefix(table, "public.") {
			t.Errorf("table %s has no rows of two users here: add them to seedRights", table)
		}
		if off := db.Text(`SELECT NOT relrowsecurity AND relnamespace = 'public'::regnamespace FROM pg_class WHERE oid = $1::regclass`, table); off == "t" {
			t.Errorf("row level security is off on %s", table)
		}
		fmt.Fprintf(&out, "%s\n", table)
		for _, w := range people {
			verbs := rights(t, db, w, table, pair, seeded)
			if verbs != "" {
				fmt.Fprintf(&out, "  %-10s %s\n", w.name, verbs)
			}
		}
	}
	fmt.Fprintln(&out, "functions")
	for _, w := range people {
		cursor, err := db.Pool.Query(ctx, `SELECT p.proname FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
			WHERE n.nspname IN ('public', 'lorayard', 'lorayard_views') AND has_schema_privilege($1, n.oid, 'USAGE') AND has_function_privilege($1, p.oid, 'EXECUTE') ORDER BY 1`, w.role)
		if err != nil {
			t.Fatal(err)
		}
		names, err := pgx.CollectRows(cursor, pgx.RowTo[string])
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&out, "  %-10s %s\n", w.name, strings.Join(names, " "))
	}
	const golden = "testdata/rights.txt"
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(golden, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if string(want) != out.String() {
		t.Errorf("rights are not those of %s. They are:\n%s", golden, out.String())
	}
}

// rights lists what somebody may do to a table: verb=reach, where reach is own,
// all or none of the rows; a verb that is denied is left out.
func rights(t *testing.T, db *storetest.DB, w who, table string, pair [2]string, seeded bool) string {
	t.Helper()
	ctx := context.Background()
	var verbs []string
	add := func(verb, how string) {
		if how != "-" {
			verbs = append(verbs, verb+"="+how)
		}
	}
	type results = [2]struct {
		rows int64
		err  error
	}
	each := func(sql string, args func(i int) []any) string {
		var rs results
		for i := range pair {
			rs[i].err = try(t, db, w, func(tx pgx.Tx) error {
				tag, err := tx.Exec(ctx, sql, args(i)...)
				rs[i].rows = tag.RowsAffected()
				return err
			})
		}
		return reach(rs)
	}
	if !seeded { // control state: granted, or not
		schema, _, _ := strings.Cut(table, ".")
		for _, verb := range []string{"select", "insert", "update", "delete", "truncate"} {
			if db.Text(`SELECT has_schema_privilege($1, $2, 'USAGE') AND has_table_privilege($1, $3, $4)`, w.role, schema, table, verb) == "t" {
				verbs = append(verbs, verb)
			}
		}
		return strings.Join(verbs, " ")
	}
	id := func(i int) []any { return []any{pair[i]} }
	add("select", each(`SELECT 1 FROM `+table+` WHERE id = $1`, id))
	add("insert", each(`INSERT INTO `+table+` SELECT * FROM jsonb_populate_record(NULL::`+table+`, $1)`, func(i int) []any {
		return []any{db.Text(`SELECT to_jsonb(x) || jsonb_build_object('id', gen_random_uuid()) FROM `+table+` x WHERE id = $1`, pair[i])}
	}))
	columns := strings.Fields(db.Text(`SELECT string_agg(attname, ' ' ORDER BY attnum) FROM pg_attribute
		WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped AND has_column_privilege($2, $1, attname, 'UPDATE')`, table, w.role))
	how := "-"
	for _, c := range columns {
		set := c + ` = ` + c
		if table == "public.training_jobs" && c == "status" {
			set = `status = 'cancelled'`
		}
		if h := each(`UPDATE `+table+` SET `+set+` WHERE id = $1`, id); h != "-" && h != "none" {
			how = h
		} else if how == "-" {
			how = h
		}
	}
	if all := db.Text(`SELECT count(*) FROM pg_attribute WHERE attrelid = $1::regclass AND attnum > 0 AND NOT attisdropped`, table); how != "-" && fmt.Sprint(len(columns)) != all {
		how += "(" + strings.Join(columns, ",") + ")"
	}
	add("update", how)
	add("delete", each(`DELETE FROM `+table+` WHERE id = $1`, id))
	return strings.Join(verbs, " ")
}
