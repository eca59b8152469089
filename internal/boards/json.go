package boards

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
)

type object = map[string]any

// Data sources are chosen at the top of each board.
const (
	metricsSource  = "${metrics}"
	databaseSource = "${database}"
	postgres       = "grafana-postgresql-datasource"
)

// JSON is the board as Grafana reads it.
func (b Board) JSON() ([]byte, error) {
	var buf bytes.Buffer
	e := json.NewEncoder(&buf)
	e.SetEscapeHTML(false)
	e.SetIndent("", " ")
	if err := e.Encode(b.object()); err != nil {
		return nil, fmt.Errorf("encode board %s: %w", b.UID, err)
	}
	return buf.Bytes(), nil
}

func (b Board) object() object {
	return object{
		"uid": b.UID, "title": "Lorayard / " + b.Title, "description": b.About, "tags": []string{"lorayard"}, "editable": false,
		"schemaVersion": 39, "version": 1, "timezone": "browser", "refresh": "10s", "graphTooltip": 1,
		"time":       object{"from": "now-1h", "to": "now"},
		"templating": object{"list": b.variables()},
		"links": []object{{
			"type": "dashboards", "tags": []string{"lorayard"}, "title": "Boards", "asDropdown": false, "includeVars": true, "keepTime": true, "targetBlank": false, "icon": "external link",
		}},
		"annotations": object{"list": []object{{
			"name": "Alerts", "enable": true, "iconColor": "red", "datasource": object{"type": "prometheus", "uid": metricsSource},
			"expr": `ALERTS{alertstate="firing", severity="page"}`, "titleFormat": "{{alertname}}", "textFormat": "{{instance}} {{gpu_uuid}}", "step": "30s",
		}}},
		"panels": b.panels(),
	}
}

func (b Board) variables() []object {
	list := []object{
		{"name": "metrics", "label": "Prometheus", "type": "datasource", "query": "prometheus", "refresh": 1, "hide": 0},
		{"name": "database", "label": "Postgres", "type": "datasource", "query": postgres, "refresh": 1, "hide": 0},
	}
	for _, v := range b.Vars {
		o := object{"name": v.Name, "label": v.Label, "type": "query", "refresh": 2, "sort": 1, "includeAll": v.All, "multi": v.All}
		if v.SQL != "" {
			o["datasource"] = object{"type": postgres, "uid": databaseSource}
			o["query"], o["definition"] = v.SQL, v.SQL
			o["sort"] = 0
		} else {
			q := fmt.Sprintf("label_values(%s, %s)", v.Metric, v.Of)
			o["datasource"] = object{"type": "prometheus", "uid": metricsSource}
			o["query"], o["definition"] = object{"query": q, "refId": "variable"}, q
		}
		if v.All {
			o["allValue"], o["current"] = ".*", object{"text": []string{"All"}, "value": []string{"$__all"}}
		}
		list = append(list, o)
	}
	return list
}

// panels lays rows from the top, their panels from the left.
func (b Board) panels() []object {
	var out []object
	id, y := 0, 0
	for _, r := range b.Rows {
		id++
		out = append(out, object{"id": id, "type": "row", "title": r.Title, "collapsed": false, "panels": []object{}, "gridPos": object{"x": 0, "y": y, "w": 24, "h": 1}})
		y++
		x, tallest := 0, 0
		for _, pn := range r.Panels {
			h := pn.Height
			if h == 0 {
				h = 8
			}
			if x+pn.Width > 24 {
				x, y, tallest = 0, y+tallest, 0
			}
			id++
			out = append(out, pn.object(id, object{"x": x, "y": y, "w": pn.Width, "h": h}))
			x += pn.Width
			tallest = max(tallest, h)
		}
		y += tallest
	}
	return out
}

func (pn Panel) object(id int, at object) object {
	return object{
		"id": id, "type": string(pn.Kind), "title": pn.Title, "description": pn.About, "gridPos": at,
		"datasource": pn.source(), "targets": pn.targets(), "fieldConfig": pn.fields(), "options": pn.options(), "transformations": pn.transformations(),
	}
}

// source is the data source of a panel: all of its queries ask the same one.
func (pn Panel) source() object {
	if len(pn.Asks) > 0 && pn.Asks[0].SQL != "" {
		return object{"type": postgres, "uid": databaseSource}
	}
	return object{"type": "prometheus", "uid": metricsSource}
}

func (pn Panel) targets() []object {
	var out []object
	for i, a := range pn.Asks {
		t := object{"refId": string(rune('A' + i)), "datasource": pn.source()}
		if a.SQL != "" {
			t["rawSql"], t["rawQuery"], t["editorMode"], t["format"] = a.SQL, true, "code", "table"
			if a.Time {
				t["format"] = "time_series"
			}
		} else {
			t["expr"], t["legendFormat"], t["editorMode"] = a.Expr, a.Legend, "code"
			t["instant"], t["range"] = a.Now, !a.Now
			if pn.Kind == Table {
				t["format"] = "table"
			}
		}
		out = append(out, t)
	}
	return out
}

func (pn Panel) fields() object {
	steps := []object{{"color": "green", "value": nil}}
	switch {
	case pn.Alarm != 0 && pn.Low:
		steps = []object{{"color": "red", "value": nil}, {"color": "green", "value": pn.Alarm}}
	case pn.Alarm != 0:
		steps = append(steps, object{"color": "red", "value": pn.Alarm})
	}
	d := object{"unit": pn.Unit, "thresholds": object{"mode": "absolute", "steps": steps}}
	if pn.Max != 0 {
		d["min"], d["max"] = 0, pn.Max
	}
	custom := object{}
	switch pn.Kind {
	case Graph, Curve:
		custom = object{"lineWidth": 1, "fillOpacity": 8, "showPoints": "never", "spanNulls": false}
		if pn.Stacked {
			custom["stacking"], custom["fillOpacity"] = object{"mode": "normal", "group": "A"}, 40
		}
	case Timeline:
		custom = object{"fillOpacity": 80, "lineWidth": 0}
	case Table:
		custom = object{"align": "auto", "filterable": true}
	}
	d["custom"] = custom
	if pn.States != nil {
		options := object{}
		for _, v := range slices.Sorted(maps.Keys(pn.States)) {
			options[strconv.Itoa(v)] = object{"text": pn.States[v].Name, "color": pn.States[v].Colour, "index": v}
		}
		d["mappings"] = []object{{"type": "value", "options": options}}
	}
	if pn.Drill != "" {
		d["links"] = []object{{"title": "Look closer", "url": fmt.Sprintf("/d/%s?${__url_time_range}&var-%s=%s", pn.Drill, pn.DrillBy, drillValue(pn))}}
	}
	overrides := []object{}
	for _, column := range slices.Sorted(maps.Keys(pn.Units)) {
		overrides = append(overrides, object{
			"matcher":    object{"id": "byName", "options": column},
			"properties": []object{{"id": "unit", "value": pn.Units[column]}},
		})
	}
	return object{"defaults": d, "overrides": overrides}
}

// drillValue is where the variable's value stands: in a cell of the row, or in a
// label of the series.
func drillValue(pn Panel) string {
	if pn.Kind == Table {
		return "${__data.fields." + pn.DrillBy + "}"
	}
	return "${__field.labels." + pn.DrillBy + "}"
}

func (pn Panel) options() object {
	switch pn.Kind {
	case Stat:
		return object{"reduceOptions": object{"calcs": []string{"lastNotNull"}, "fields": "", "values": false}, "colorMode": "value", "graphMode": "area", "textMode": "auto"}
	case Bars:
		return object{"reduceOptions": object{"calcs": []string{"lastNotNull"}, "fields": "", "values": false}, "orientation": "horizontal", "displayMode": "basic"}
	case Table:
		return object{"showHeader": true, "cellHeight": "sm", "footer": object{"show": false}}
	case Timeline:
		return object{"mergeValues": true, "showValue": "never", "rowHeight": 0.8, "legend": object{"showLegend": true, "displayMode": "list", "placement": "bottom"}}
	case Curve:
		return object{"xField": pn.X, "legend": object{"showLegend": true, "displayMode": "list", "placement": "bottom"}, "tooltip": object{"mode": "multi", "sort": "desc"}}
	}
	return object{"legend": object{"showLegend": true, "displayMode": "list", "placement": "bottom"}, "tooltip": object{"mode": "multi", "sort": "desc"}}
}

// transformations make one table of several queries of Prometheus, without what
// only Prometheus knows.
func (pn Panel) transformations() []object {
	if pn.Kind != Table || len(pn.Asks) == 0 || pn.Asks[0].SQL != "" {
		return []object{}
	}
	hidden, names := object{"Time": true, "job": true, "__name__": true}, object{}
	for i, a := range pn.Asks {
		field := "Value #" + string(rune('A'+i))
		if len(pn.Asks) == 1 {
			field = "Value"
		}
		if a.Legend == "" {
			hidden[field] = true
		} else {
			names[field] = a.Legend
		}
	}
	return []object{
		{"id": "merge", "options": object{}},
		{"id": "organize", "options": object{"excludeByName": hidden, "renameByName": names, "indexByName": object{}}},
	}
}
