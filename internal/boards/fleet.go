package boards

// health is a device's standing as one number: busy is 1, each trouble a larger
// power of two.
const health = `max by (instance, gpu_uuid) (lorayard_gpu_busy{instance=~"$instance"})
 + 2 * max by (instance, gpu_uuid) (lorayard_gpu_health{state="suspect", instance=~"$instance"})
 + 4 * max by (instance, gpu_uuid) (lorayard_gpu_health{state="foreign", instance=~"$instance"})
 + 8 * max by (instance, gpu_uuid) (lorayard_gpu_health{state="quarantined", instance=~"$instance"})
 + 16 * max by (instance, gpu_uuid) (lorayard_gpu_health{state="missing", instance=~"$instance"})`

var healthStates = map[int]State{
	0: {"idle", "#73BF69"}, 1: {"busy", "#5794F2"}, 2: {"suspect", "#FADE2A"}, 3: {"suspect, busy", "#FF9830"}, 4: {"foreign", "#B877D9"}, 5: {"foreign, busy", "#B877D9"},
	8: {"quarantined", "#F2495C"}, 9: {"quarantined, busy", "#C4162A"}, 16: {"missing", "#990000"}, 17: {"missing, busy", "#990000"},
}

var instances = Var{Name: "instance", Label: "Host", Metric: `lorayard_build_info{component="agent"}`, Of: "instance", All: true}

func fleet() Board {
	return Board{
		UID: uidFleet, Title: "Fleet", About: "The whole fleet on one screen: what runs, what waits, what is broken, what it costs.",
		Vars: []Var{instances},
		Rows: []Row{
			{"Now", []Panel{
				{Title: "Jobs running", About: "Attempts that agents have accepted.", Kind: Stat, Unit: "short", Width: 3, Height: 4, Asks: []Ask{p(`sum(lorayard_dispatcher_jobs{state="accepted"})`, "running")}},
				{Title: "Jobs waiting", About: "Admitted jobs without an attempt.", Kind: Stat, Unit: "short", Width: 3, Height: 4, Asks: []Ask{p(`sum(lorayard_dispatcher_jobs{state="queued"})`, "waiting")}},
				{
					Title: "Devices busy", About: "Share of the devices of living agents that an attempt holds.", Kind: Stat, Unit: "percentunit", Width: 3, Height: 4,
					Asks: []Ask{p(`sum(lorayard_fleet_gpus{state="busy"}) / sum(lorayard_fleet_gpus)`, "busy")},
				},
				{
					Title: "Idle beside a queue", About: "Devices that are idle while a job waits that may land on them.", Kind: Stat, Unit: "short", Width: 3, Height: 4, Alarm: 1,
					Asks: []Ask{p(`sum(lorayard_fleet_gpus{state="idle_with_queue"})`, "devices")},
				},
				{Title: "Devices not fit", About: "Devices that are quarantined, missing or used by others.", Kind: Stat, Unit: "short", Width: 3, Height: 4, Alarm: 1, Asks: []Ask{p(`sum(lorayard_fleet_gpus{state="unfit"})`, "devices")}},
				{Title: "Hosts", About: "Agents by state; lost ones hold no lease.", Kind: Stat, Unit: "short", Width: 3, Height: 4, Asks: []Ask{p(`sum by (state) (lorayard_fleet_agents)`, "{{state}}"), p(`sum(lorayard_dispatcher_hosts)`, "offered work")}},
				{
					Title: "Jobs that did not fail by us, 24 h", About: "Objective: 99.5 % of the jobs that ended.", Kind: Stat, Unit: "percentunit", Width: 3, Height: 4, Alarm: 0.995, Low: true,
					Asks: []Ask{p(`1 - sum(increase(lorayard_jobs_settled_total{status="failed_infra"}[24h])) / sum(increase(lorayard_jobs_settled_total[24h]))`, "jobs")},
				},
				{Title: "Alerts", About: "What fires now.", Kind: Stat, Unit: "short", Width: 3, Height: 4, Alarm: 1, Asks: []Ask{p(`count(ALERTS{alertstate="firing"}) or vector(0)`, "firing")}},
			}},
			{"Devices", []Panel{
				{
					Title: "Devices by state", About: "Devices of living agents. idle_with_queue: a job waits that may land on the class.", Kind: Graph, Unit: "short", Width: 12, Stacked: true,
					Asks: []Ask{p(`sum by (state) (lorayard_fleet_gpus)`, "{{state}}")},
				},
				{
					Title: "Busy devices and waiting jobs", About: "Both should not be low and high at once.", Kind: Graph, Unit: "short", Width: 12,
					Asks: []Ask{p(`sum(lorayard_fleet_gpus{state="busy"})`, "devices busy"), p(`sum(lorayard_dispatcher_jobs{state="queued"})`, "jobs waiting")},
				},
				{
					Title: "Each device", About: "Who is busy, and who is in trouble since when.", Kind: Timeline, Unit: "none", Width: 24, Height: 12, States: healthStates,
					Asks: []Ask{p(health, "{{instance}} {{gpu_uuid}}")}, Drill: uidHost, DrillBy: "instance",
				},
				{
					Title: "Devices in figures", About: "The newest readings; empty where the device does not tell. A row leads to its host.", Kind: Table, Unit: "none", Width: 24, Height: 12,
					Units: map[string]string{"Utilization": "percentunit", "Memory used": "bytes", "Temperature": "celsius", "Power": "watt"},
					Asks: []Ask{
						now(`max by (instance, gpu_uuid, class) (lorayard_gpu_info{instance=~"$instance"})`, ""),
						now(health, "State"),
						now(`max by (instance, gpu_uuid) (lorayard_gpu_utilization_ratio{instance=~"$instance"})`, "Utilization"),
						now(`max by (instance, gpu_uuid) (lorayard_gpu_memory_bytes{kind="used", instance=~"$instance"})`, "Memory used"),
						now(`max by (instance, gpu_uuid) (lorayard_gpu_temperature_celsius{sensor="chip", instance=~"$instance"})`, "Temperature"),
						now(`max by (instance, gpu_uuid) (lorayard_gpu_power_watts{instance=~"$instance"})`, "Power"),
						now(`max by (instance, gpu_uuid, job_id) (lorayard_job_info{instance=~"$instance"})`, ""),
					}, Drill: uidHost, DrillBy: "instance",
				},
			}},
			{"Work", []Panel{
				{Title: "Attempts that ended", About: "By outcome, an hour.", Kind: Graph, Unit: "short", Width: 8, Stacked: true, Asks: []Ask{p(`sum by (outcome) (rate(lorayard_job_attempts_total[5m])) * 3600`, "{{outcome}}")}},
				{Title: "Training throughput", About: "Tokens a second, summed over running attempts.", Kind: Graph, Unit: "short", Width: 8, Asks: []Ask{p(`sum(lorayard_agent_trainer_tokens_per_second)`, "tokens/s")}},
				{
					Title: "What GPU time was good for", About: "Of ended attempts: useful was kept by a checkpoint or an adapter, wasted was lost, overhead is all else.", Kind: Graph, Unit: "percentunit", Width: 8, Stacked: true,
					Asks: []Ask{p(`sum by (use) (rate(lorayard_agent_gpu_seconds_total[30m])) / scalar(sum(rate(lorayard_agent_gpu_seconds_total[30m])))`, "{{use}}")},
				},
				{
					Title: "Running and waiting", About: "A row leads to the job.", Kind: Table, Unit: "none", Width: 24, Height: 10, Units: map[string]string{"percent": "percent", "dollars": "currencyUSD"},
					Asks: []Ask{table(`SELECT job::text AS job, status, stage, wish, gpus, agent, attempts, step, steps, percent, dollars, waiting, admitted_at FROM lorayard_views.jobs WHERE state IN ('queued', 'assigned', 'accepted') ORDER BY admitted_at LIMIT 200`)}, Drill: uidJob, DrillBy: "job",
				},
				{
					Title: "Hosts and their faults", About: "Devices that are not fit, with what to do about them.", Kind: Table, Unit: "none", Width: 24, Height: 6,
					Asks: []Ask{table(`SELECT d.agent AS instance, d.gpu_uuid, d.class, d.fault FROM lorayard_views.devices d WHERE d.fault <> '' ORDER BY 1, 2`)}, Drill: uidHost, DrillBy: "instance",
				},
			}},
		},
	}
}
