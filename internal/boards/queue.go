package boards

// quantiles asks for the median and the slow ones of a histogram.
func quantiles(metric, of, legend string) []Ask {
	var out []Ask
	for _, q := range []string{"0.5", "0.9", "0.99"} {
		out = append(out, p(`histogram_quantile(`+q+`, sum by (le`+of+`) (rate(`+metric+`_bucket[5m])))`, legend+" p"+q[2:]))
	}
	return out
}

func queue() Board {
	return Board{
		UID: uidQueue, Title: "Queue and SLO", About: "How long jobs wait and why, how fast they are handed over and how well they recover, against the objectives.",
		Vars: []Var{{Name: "class", Label: "Class", Metric: "lorayard_fleet_gpus", Of: "class", All: true}},
		Rows: []Row{
			{"Objectives", []Panel{
				{
					Title: "Hand-over within a second, 24 h", About: "Objective: 99 % of attempts are accepted within a second of their assignment.", Kind: Stat, Unit: "percentunit", Width: 6, Height: 5, Alarm: 0.99, Low: true,
					Asks: []Ask{p(`sum(increase(lorayard_job_handover_seconds_bucket{le=~"1|1.0"}[24h])) / sum(increase(lorayard_job_handover_seconds_count[24h]))`, "in time")},
				},
				{
					Title: "Jobs that did not fail by us, 24 h", About: "Objective: 99.5 %.", Kind: Stat, Unit: "percentunit", Width: 6, Height: 5, Alarm: 0.995, Low: true,
					Asks: []Ask{p(`1 - sum(increase(lorayard_jobs_settled_total{status="failed_infra"}[24h])) / sum(increase(lorayard_jobs_settled_total[24h]))`, "jobs")},
				},
				{
					Title: "Recovery within two minutes, 24 h", About: "Objective: 99 % of attempts that infrastructure failed are followed by the next within two minutes.", Kind: Stat, Unit: "percentunit", Width: 6, Height: 5, Alarm: 0.99, Low: true,
					Asks: []Ask{p(`sum(increase(lorayard_job_recovery_seconds_bucket{le=~"120|120.0"}[24h])) / sum(increase(lorayard_job_recovery_seconds_count[24h]))`, "in time")},
				},
				{
					Title: "How fast the allowances burn", About: "1 spends the allowance of a month in a month; 14.4 pages.", Kind: Graph, Unit: "short", Width: 6, Height: 5,
					Asks: []Ask{
						p(`lorayard:handover_slow:ratio1h / 0.01`, "hand-over"), p(`lorayard:jobs_failed_by_us:ratio1h / 0.005`, "jobs"), p(`lorayard:recovery_slow:ratio1h / 0.01`, "recovery"),
					},
				},
			}},
			{"Queue", []Panel{
				{
					Title: "Waiting jobs by reason", About: "no_devices: all taken; promised: devices are being made free; quota, behind_own: the user's own limit; nowhere: no host will ever do.", Kind: Graph, Unit: "short", Width: 12, Stacked: true,
					Asks: []Ask{p(`sum by (class, reason) (lorayard_queue_jobs{class=~"$class"})`, "{{class}} {{reason}}")},
				},
				{Title: "Age of the oldest", About: "Since it was admitted.", Kind: Graph, Unit: "s", Width: 12, Asks: []Ask{p(`max by (class) (lorayard_queue_oldest_age_seconds{class=~"$class"})`, "{{class}}")}},
				{Title: "Wait for the first assignment", About: "From admission, by class.", Kind: Graph, Unit: "s", Width: 12, Asks: quantiles(`lorayard_job_wait_seconds`, ", class", "{{class}}")},
				{
					Title: "Arrivals, starts and ends", About: "An hour. Arrivals above ends for long make a queue.", Kind: Graph, Unit: "short", Width: 12,
					Asks: []Ask{
						p(`sum(rate(lorayard_dispatcher_admissions_total{result="admitted"}[5m])) * 3600`, "admitted"), p(`sum(rate(lorayard_dispatcher_assignments_total[5m])) * 3600`, "assigned"),
						p(`sum(rate(lorayard_jobs_settled_total[5m])) * 3600`, "settled"), p(`sum(rate(lorayard_dispatcher_admissions_total{result="refused"}[5m])) * 3600`, "refused"),
					},
				},
				{
					Title: "The queue", About: "In the order of admission. A row leads to the job.", Kind: Table, Unit: "none", Width: 24, Height: 9,
					Asks: []Ask{table(`SELECT job::text AS job, wish, gpus, base_model, priority, attempts, failures, losses, waiting, admitted_at FROM lorayard_views.jobs WHERE state = 'queued' ORDER BY priority DESC, admitted_at LIMIT 200`)}, Drill: uidJob, DrillBy: "job",
				},
			}},
			{"Hand-over and recovery", []Panel{
				{Title: "From assigned to accepted", About: "The hand-over through Redis and the agent's accept. Dots are single jobs, where traces are on.", Kind: Graph, Unit: "s", Width: 8, Asks: quantiles(`lorayard_job_handover_seconds`, "", "hand-over")},
				{Title: "From a fault to the next attempt", About: "By kind of the failure.", Kind: Graph, Unit: "s", Width: 8, Asks: quantiles(`lorayard_job_recovery_seconds`, ", kind", "{{kind}}")},
				{Title: "Failed and lost attempts by kind", About: "An hour.", Kind: Graph, Unit: "short", Width: 8, Stacked: true, Asks: []Ask{p(`sum by (kind) (rate(lorayard_job_attempts_total{outcome=~"failed|lost|not_accepted"}[5m])) * 3600 > 0`, "{{kind}}")}},
				{Title: "Tasks received by agents", About: "Stale ones are late or doubled and do no harm.", Kind: Graph, Unit: "short", Width: 8, Asks: []Ask{p(`sum by (result) (rate(lorayard_agent_accepts_total[5m])) * 3600`, "{{result}}")}},
				{
					Title: "Taken back, reaped, preempted", About: "An hour: assignments that nobody accepted, attempts lost with their agent, attempts that made room.", Kind: Graph, Unit: "short", Width: 8,
					Asks: []Ask{
						p(`sum(rate(lorayard_dispatcher_taken_back_total[5m])) * 3600`, "taken back"), p(`sum(rate(lorayard_dispatcher_reaped_total[5m])) * 3600`, "reaped"),
						p(`sum(rate(lorayard_dispatcher_preemptions_total[5m])) * 3600`, "preempted"), p(`sum by (result) (rate(lorayard_dispatcher_death_reports_total[5m])) * 3600`, "death reports {{result}}"),
					},
				},
				{Title: "Tasks sent", About: "An hour; errors are Redis being away.", Kind: Graph, Unit: "short", Width: 8, Asks: []Ask{p(`sum by (result) (rate(lorayard_dispatcher_sends_total[5m])) * 3600`, "{{result}}")}},
			}},
			{"Control plane", []Panel{
				{Title: "Rounds", About: "Time of one round of the leader.", Kind: Graph, Unit: "s", Width: 8, Asks: quantiles(`lorayard_dispatcher_round_seconds`, "", "round")},
				{Title: "Who leads", About: "One of them, always.", Kind: Graph, Unit: "short", Width: 4, Stacked: true, Asks: []Ask{p(`lorayard_dispatcher_leader`, "{{instance}}")}},
				{Title: "Failed rounds", About: "A second.", Kind: Graph, Unit: "short", Width: 4, Asks: []Ask{p(`sum by (instance) (rate(lorayard_dispatcher_rounds_total{result="error"}[5m]))`, "{{instance}}")}},
				{Title: "Grants", About: "Signed URLs and upload tokens, a minute.", Kind: Graph, Unit: "short", Width: 4, Asks: []Ask{p(`sum by (result) (rate(lorayard_dispatcher_grants_total[5m])) * 60`, "{{result}}")}},
				{
					Title: "Presence streams", About: "Agents that have one to each dispatcher; and losses a minute.", Kind: Graph, Unit: "short", Width: 4,
					Asks: []Ask{p(`sum by (instance) (lorayard_dispatcher_presence_streams)`, "{{instance}}"), p(`sum(rate(lorayard_dispatcher_presence_losses_total[5m])) * 60`, "losses")},
				},
				{Title: "Validations of data sets", About: "A minute, by result.", Kind: Graph, Unit: "short", Width: 8, Asks: []Ask{p(`sum by (result) (rate(lorayard_dispatcher_validations_total[5m])) * 60`, "{{result}}")}},
				{Title: "Objects removed from Storage", About: "A minute.", Kind: Graph, Unit: "short", Width: 8, Asks: []Ask{p(`sum(rate(lorayard_dispatcher_objects_removed_total[15m])) * 60`, "objects")}},
				{
					Title: "Age of what is known", About: "Of the last good round, and of the last look at fleet and attempts.", Kind: Graph, Unit: "s", Width: 8,
					Asks: []Ask{p(`time() - max(lorayard_dispatcher_last_round_timestamp_seconds)`, "round"), p(`time() - max(lorayard_watch_last_success_timestamp_seconds)`, "watch")},
				},
			}},
		},
	}
}
