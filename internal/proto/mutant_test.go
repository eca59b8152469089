package proto_test

import (
	"reflect"
	"testing"

	"lorayard/internal/proto"
)

// A mutant is looked for with one fault; what takes more is looked for among
// those that it takes.
func (m *model) only(fs ...fault) *model {
	m.budget = [faults]uint8{}
	for _, f := range fs {
		m.budget[f] = 1
	}
	return m
}

// twice lets a fault happen so often.
func (m *model) twice(f fault) *model {
	m.budget[f] = 2
	return m
}

func (m *model) netless() *model {
	m.net = false
	return m
}

func TestAProtocolWithoutAnyOneOfItsRulesIsCaught(t *testing.T) {
	rules := reflect.TypeFor[proto.Rules]()
	for i := range rules.NumField() {
		t.Run(rules.Field(i).Name, func(t *testing.T) {
			var r proto.Rules
			reflect.ValueOf(&r).Elem().Field(i).SetBool(true)
			for _, m := range []*model{
				newModel(r, true, 1, 1, 2).netless(),
				newModel(r, true, 1, 1, 2),
				newModel(r, false, 1, 1, 2),
				newModel(r, true, 1, 2, 2).only(silence, slowDecision),
				newModel(r, true, 1, 2, 2).only(silence, lateRenewal),
				newModel(r, true, 1, 2, 2).only(killAgent, cancelJob),
				newModel(r, true, 1, 3, 1).only(silence, twin, killAgent),
				newModel(r, true, 1, 2, 1).only(killAgent).twice(killAgent),
			} {
				if res := m.explore(2_000_000); res.bad != "" {
					t.Logf("%v: %s", res, res.explain())
					return
				}
			}
			t.Error("nobody noticed that the rule is missing")
		})
	}
}
