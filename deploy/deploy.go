// Package deploy carries the migrations inside the dispatcher, from the very
// files that the supabase CLI can push.
package deploy

import "embed"

// Migrations holds supabase/migrations/<version>_<name>.sql.
//
//go:embed supabase/migrations/*.sql
var Migrations embed.FS

// StandIns creates what a database that is not Supabase lacks of Supabase
// Auth. Development and tests only.
//
//go:embed supabase/dev/stand_ins.sql
var StandIns string
