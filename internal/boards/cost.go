package boards

func cost() Board {
	return Board{
		UID: uidCost, Title: "Cost and energy", About: "What was billed, what was not, what the devices did for it and what power they took. Money is from the ledger in Postgres.",
		Rows: []Row{
			{"The ledger", []Panel{
				{Title: "Billed in this time", About: "Cost records, after rounding to cents.", Kind: Stat, Unit: "currencyUSD", Width: 4, Height: 5, Asks: []Ask{table(`SELECT coalesce(sum(dollars), 0) AS dollars FROM lorayard_views.costs WHERE $__timeFilter(recorded_at)`)}},
				{Title: "GPU time not billed", About: "At its rate: lost attempts, faults of ours, bad data files.", Kind: Stat, Unit: "currencyUSD", Width: 4, Height: 5, Asks: []Ask{table(`SELECT coalesce(sum(dollars), 0) AS dollars FROM lorayard_views.usage WHERE NOT billable AND $__timeFilter(ended)`)}},
				{Title: "Drift", About: "Cost records of the last day minus rate × billable time. Must be zero.", Kind: Stat, Unit: "currencyUSD", Width: 4, Height: 5, Alarm: 0.005, Asks: []Ask{p(`max(lorayard_ledger_drift_dollars)`, "drift")}},
				{Title: "Open intervals", About: "Devices whose time is being written; and those that nobody writes any more, which must be none.", Kind: Stat, Unit: "short", Width: 4, Height: 5, Asks: []Ask{p(`max(lorayard_ledger_open_intervals)`, "open"), p(`max(lorayard_ledger_stray_intervals)`, "stray")}},
				{Title: "Last check", About: "How long ago the ledger was checked.", Kind: Stat, Unit: "s", Width: 4, Height: 5, Alarm: 900, Asks: []Ask{p(`time() - max(lorayard_ledger_last_check_timestamp_seconds)`, "ago")}},
				{Title: "Running now", About: "Dollars an hour of what is held and billable, at the rate of each interval.", Kind: Stat, Unit: "currencyUSD", Width: 4, Height: 5, Asks: []Ask{table(`SELECT coalesce(sum(dollars / nullif(gpu_seconds, 0) * 3600), 0) AS dollars FROM lorayard_views.usage WHERE NOT closed`)}},
			}},
			{"Money", []Panel{
				{Title: "GPU time by class and day", About: "Dollars at the rate of each interval.", Kind: Graph, Unit: "currencyUSD", Width: 12, Stacked: true, Asks: []Ask{series(`SELECT date_trunc('day', ended) AS "time", class || CASE WHEN billable THEN '' ELSE ', not billed' END AS metric, sum(dollars) AS value FROM lorayard_views.usage WHERE $__timeFilter(ended) GROUP BY 1, 2 ORDER BY 1`)}},
				{Title: "Who pays most", About: "Billed in this time, by user.", Kind: Table, Unit: "none", Width: 6, Units: map[string]string{"dollars": "currencyUSD"}, Asks: []Ask{table(`SELECT user_id::text AS "user", count(*) AS records, sum(dollars) AS dollars FROM lorayard_views.costs WHERE $__timeFilter(recorded_at) GROUP BY 1 ORDER BY 3 DESC LIMIT 10`)}},
				{Title: "Not billed, by reason", About: "GPU hours of attempts that the user does not pay, by kind of failure.", Kind: Table, Unit: "none", Width: 6, Units: map[string]string{"dollars": "currencyUSD"}, Asks: []Ask{table(`SELECT a.outcome, a.kind, sum(u.gpu_seconds) / 3600 AS gpu_hours, sum(u.dollars) AS dollars FROM lorayard_views.usage u JOIN lorayard_views.attempts a ON a.job = u.job AND a.attempt = u.attempt WHERE NOT u.billable AND $__timeFilter(u.ended) GROUP BY 1, 2 ORDER BY 4 DESC`)}},
				{Title: "Dearest jobs", About: "Billed in this time. A row leads to the job.", Kind: Table, Unit: "none", Width: 12, Units: map[string]string{"dollars": "currencyUSD"}, Asks: []Ask{table(`SELECT job::text AS job, cost_type, dollars, recorded_at FROM lorayard_views.costs WHERE $__timeFilter(recorded_at) ORDER BY dollars DESC LIMIT 20`)}, Drill: uidJob, DrillBy: "job"},
				{Title: "Dollars for a million tokens", About: "Billable dollars of each class over a million trained tokens, estimated from samples.", Kind: Table, Unit: "none", Width: 12, Units: map[string]string{"dollars_per_million_tokens": "currencyUSD"}, Asks: []Ask{table(`SELECT u.class, sum(u.dollars) AS dollars, sum(u.gpu_seconds) / 3600 AS gpu_hours, sum(u.dollars) / nullif(sum(u.gpu_seconds * s.speed), 0) * 1000000 AS dollars_per_million_tokens FROM lorayard_views.usage u JOIN (SELECT job, attempt, avg(tokens_per_second) AS speed FROM lorayard_views.samples WHERE tokens_per_second <> 'NaN' AND $__timeFilter(at) GROUP BY 1, 2) s ON s.job = u.job AND s.attempt = u.attempt WHERE u.billable AND $__timeFilter(u.ended) GROUP BY 1 ORDER BY 1`)}},
			}},
			{"What devices did", []Panel{
				{Title: "GPU hours by state", About: "An hour of wall time. idle_with_queue is money for nothing.", Kind: Graph, Unit: "short", Width: 12, Stacked: true, Asks: []Ask{p(`sum by (class, state) (rate(lorayard_fleet_gpu_seconds_total[15m]))`, "{{class}} {{state}}")}},
				{Title: "Useful, wasted, overhead", About: "GPU time of ended attempts, in GPU hours an hour.", Kind: Graph, Unit: "short", Width: 12, Stacked: true, Asks: []Ask{p(`sum by (use) (rate(lorayard_agent_gpu_seconds_total[15m]))`, "{{use}}")}},
				{Title: "Goodput, 24 h", About: "Share of the GPU time of ended attempts that was useful.", Kind: Stat, Unit: "percentunit", Width: 6, Height: 5, Asks: []Ask{p(`sum(increase(lorayard_agent_gpu_seconds_total{use="useful"}[24h])) / sum(increase(lorayard_agent_gpu_seconds_total[24h]))`, "useful")}},
				{Title: "Idle beside a queue, 24 h", About: "GPU hours.", Kind: Stat, Unit: "h", Width: 6, Height: 5, Asks: []Ask{p(`sum(increase(lorayard_fleet_gpu_seconds_total{state="idle_with_queue"}[24h])) / 3600`, "hours")}},
				{Title: "Out of use, 24 h", About: "GPU hours of devices that were not fit.", Kind: Stat, Unit: "h", Width: 6, Height: 5, Asks: []Ask{p(`sum(increase(lorayard_fleet_gpu_seconds_total{state="unfit"}[24h])) / 3600`, "hours")}},
				{Title: "Tokens trained, 24 h", About: "Steps that a later attempt did again included.", Kind: Stat, Unit: "short", Width: 6, Height: 5, Asks: []Ask{p(`sum(increase(lorayard_trainer_tokens_total[24h]))`, "tokens")}},
			}},
			{"Energy", []Panel{
				{Title: "Power", About: "Of all devices that tell it.", Kind: Graph, Unit: "watt", Width: 12, Stacked: true, Asks: []Ask{p(`sum by (instance) (lorayard_gpu_power_watts)`, "{{instance}}")}},
				{Title: "Energy, 24 h", About: "Taken by the devices, without the host around them.", Kind: Stat, Unit: "kwatth", Width: 6, Height: 8, Asks: []Ask{p(`sum(increase(lorayard_gpu_energy_joules_total[24h])) / 3.6e6`, "kWh")}},
				{Title: "Energy a million tokens", About: "Of the last hour, in watt hours.", Kind: Stat, Unit: "watth", Width: 6, Height: 8, Asks: []Ask{p(`sum(increase(lorayard_gpu_energy_joules_total[1h])) / 3600 / (sum(increase(lorayard_trainer_tokens_total[1h])) / 1e6)`, "Wh")}},
			}},
		},
	}
}
