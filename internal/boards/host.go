package boards

func host() Board {
	gpu := func(expr string) []Ask { return []Ask{p(expr, "{{instance}} {{gpu_uuid}}")} }
	const at = `{instance=~"$instance", gpu_uuid=~"$gpu"}`
	return Board{
		UID: uidHost, Title: "Host and GPU", About: "One host, or one device: its health, its readings, what it runs and how it speaks to the rest.",
		Vars: []Var{instances, {Name: "gpu", Label: "Device", Metric: `lorayard_gpu_info{instance=~"$instance"}`, Of: "gpu_uuid", All: true}},
		Rows: []Row{
			{"Health", []Panel{
				{Title: "Each device", About: "Who is busy, and who is in trouble since when.", Kind: Timeline, Unit: "none", Width: 24, Height: 7, States: healthStates, Asks: []Ask{p(health, "{{instance}} {{gpu_uuid}}")}},
				{Title: "Driver's verdict", About: "0 nothing, 1 reset, 2 reboot, 3 drain peers, 4 drain and reset.", Kind: Stat, Unit: "short", Width: 4, Height: 6, Alarm: 1, Asks: []Ask{p(`max(lorayard_gpu_recovery_action`+at+`)`, "action")}},
				{
					Title: "Rows waiting or failed", About: "Memory rows that wait for a reset, and those that could not be replaced.", Kind: Stat, Unit: "short", Width: 4, Height: 6, Alarm: 1,
					Asks: []Ask{p(`sum(lorayard_gpu_row_remap_pending`+at+`)`, "waiting"), p(`sum(lorayard_gpu_row_remap_failed`+at+`)`, "failed")},
				},
				{Title: "Memory errors", About: "An hour, by whether they were corrected.", Kind: Graph, Unit: "short", Width: 8, Height: 6, Asks: []Ask{p(`sum by (gpu_uuid, kind) (increase(lorayard_gpu_ecc_errors_total`+at+`[1h])) > 0`, "{{gpu_uuid}} {{kind}}"), p(`sum by (gpu_uuid, cause) (increase(lorayard_gpu_row_remaps_total`+at+`[1h])) > 0`, "{{gpu_uuid}} rows replaced, {{cause}}")}},
				{
					Title: "Faults that the driver reported", About: "XIDs by class, with the time of the last one.", Kind: Table, Unit: "none", Width: 8, Height: 6, Units: map[string]string{"Last": "dateTimeFromNow"},
					Asks: []Ask{now(`max by (gpu_uuid, xid, class) (lorayard_gpu_xid_last_timestamp_seconds`+at+`) * 1000`, "Last"), now(`sum by (gpu_uuid, xid, class) (lorayard_gpu_xid_errors_total`+at+`)`, "Times")},
				},
				{
					Title: "Taken out and brought back", About: "How often devices left and came back into use since the agent started.", Kind: Table, Unit: "none", Width: 8, Height: 6,
					Asks: []Ask{now(`sum by (gpu_uuid, reason) (lorayard_gpu_quarantines_total`+at+`)`, "Out"), now(`sum by (gpu_uuid) (lorayard_gpu_returns_total`+at+`)`, "Back")},
				},
				{Title: "Sanity runs", About: "Checks before training, by result, since the agents started.", Kind: Bars, Unit: "short", Width: 4, Height: 6, Asks: []Ask{now(`sum by (result) (lorayard_gpu_sanity_runs_total{instance=~"$instance"})`, "{{result}}")}},
				{
					Title: "Sanity checks", About: "Compute and copy speed at the last check; they should be alike within a class.", Kind: Table, Unit: "none", Width: 12, Height: 6, Units: map[string]string{"FLOP/s": "short", "Copy": "Bps", "Passed": "dateTimeFromNow"},
					Asks: []Ask{
						now(`max by (gpu_uuid) (lorayard_gpu_sanity_flops`+at+`)`, "FLOP/s"), now(`max by (gpu_uuid) (lorayard_gpu_sanity_copy_bytes_per_second`+at+`)`, "Copy"),
						now(`max by (gpu_uuid) (lorayard_gpu_sanity_last_success_timestamp_seconds`+at+`) * 1000`, "Passed"), now(`sum by (gpu_uuid) (lorayard_gpu_sanity_failures_total`+at+`)`, "Failed"),
					},
				},
			}},
			{"Readings", []Panel{
				{Title: "Utilization", About: "Share of the time in which a kernel ran.", Kind: Graph, Unit: "percentunit", Width: 8, Max: 1, Asks: gpu(`lorayard_gpu_utilization_ratio` + at)},
				{Title: "Memory used", About: "Without what the driver keeps for itself.", Kind: Graph, Unit: "bytes", Width: 8, Asks: gpu(`lorayard_gpu_memory_bytes{kind="used", instance=~"$instance", gpu_uuid=~"$gpu"}`)},
				{Title: "Memory used by others", About: "By processes that are not ours.", Kind: Graph, Unit: "bytes", Width: 8, Asks: gpu(`lorayard_gpu_foreign_memory_bytes` + at)},
				{Title: "Power", About: "Drawn; the limit is in the row's legend.", Kind: Graph, Unit: "watt", Width: 8, Asks: []Ask{p(`lorayard_gpu_power_watts`+at, "{{gpu_uuid}}"), p(`max(lorayard_gpu_power_limit_watts`+at+`)`, "limit")}},
				{Title: "Temperature", About: "Of chip and memory.", Kind: Graph, Unit: "celsius", Width: 8, Asks: []Ask{p(`lorayard_gpu_temperature_celsius`+at, "{{gpu_uuid}} {{sensor}}")}},
				{Title: "Degrees until it slows down", About: "Zero slows the device down.", Kind: Graph, Unit: "celsius", Width: 8, Asks: gpu(`lorayard_gpu_temperature_margin_celsius` + at)},
				{Title: "Clocks", About: "Of compute and memory.", Kind: Graph, Unit: "hertz", Width: 8, Asks: []Ask{p(`lorayard_gpu_clock_hertz`+at, "{{gpu_uuid}} {{domain}}")}},
				{Title: "Slowed down", About: "Share of the time, by reason. power_cap is normal under load.", Kind: Graph, Unit: "percentunit", Width: 8, Asks: []Ask{p(`sum by (gpu_uuid, reason) (rate(lorayard_gpu_throttled_seconds_total`+at+`[5m])) > 0`, "{{gpu_uuid}} {{reason}}")}},
				{
					Title: "Links", About: "PCIe lanes in use, NVLinks that are down, and errors a minute.", Kind: Graph, Unit: "short", Width: 8,
					Asks: []Ask{
						p(`lorayard_gpu_pcie_width_ratio`+at, "{{gpu_uuid}} PCIe width"), p(`lorayard_gpu_nvlinks{state="down", instance=~"$instance", gpu_uuid=~"$gpu"} > 0`, "{{gpu_uuid}} NVLinks down"),
						p(`rate(lorayard_gpu_pcie_replays_total`+at+`[5m]) * 60 > 0`, "{{gpu_uuid}} PCIe replays"), p(`rate(lorayard_gpu_nvlink_errors_total`+at+`[5m]) * 60 > 0`, "{{gpu_uuid}} NVLink {{kind}}"),
					},
				},
				{
					Title: "Polling the driver", About: "Time of a poll of all devices, and polls a minute that failed.", Kind: Graph, Unit: "s", Width: 12,
					Asks: []Ask{p(`histogram_quantile(0.99, sum by (le, tier) (rate(lorayard_gpu_poll_seconds_bucket{instance=~"$instance"}[5m])))`, "{{tier}} p99"), p(`sum by (tier) (rate(lorayard_gpu_poll_failures_total{instance=~"$instance"}[5m])) * 60 > 0`, "{{tier}} failures"), p(`sum by (instance) (increase(lorayard_gpu_driver_reopened_total{instance=~"$instance"}[1h])) > 0`, "{{instance}} opened anew")},
				},
				{Title: "From a fault to the end of the trainer", About: "How fast attempts on a broken device are ended.", Kind: Graph, Unit: "s", Width: 12, Asks: quantiles(`lorayard_gpu_fault_kill_seconds`, "", "kill")},
			}},
			{"Work", []Panel{
				{Title: "What runs here", About: "A row leads to the job.", Kind: Table, Unit: "none", Width: 24, Height: 6, Units: map[string]string{"Checkpoint age": "s"}, Asks: []Ask{
					now(`max by (instance, job_id, attempt, stage) (lorayard_job_info{instance=~"$instance"})`, ""), now(`max by (job_id, attempt) (lorayard_job_step{instance=~"$instance"})`, "Step"),
					now(`max by (job_id, attempt) (lorayard_job_steps{instance=~"$instance"})`, "of"), now(`max by (job_id, attempt) (lorayard_job_loss{instance=~"$instance"})`, "Loss"),
					now(`max by (job_id, attempt) (lorayard_job_tokens_per_second{instance=~"$instance"})`, "Tokens/s"), now(`max by (job_id, attempt) (lorayard_job_checkpoint_age_seconds{instance=~"$instance"})`, "Checkpoint age"),
				}, Drill: uidJob, DrillBy: "job_id"},
				{Title: "Steps", About: "Time of one optimizer step.", Kind: Graph, Unit: "s", Width: 8, Asks: []Ask{p(`histogram_quantile(0.5, sum by (le, instance) (rate(lorayard_trainer_step_seconds_bucket{instance=~"$instance"}[5m])))`, "{{instance}} p50"), p(`histogram_quantile(0.99, sum by (le, instance) (rate(lorayard_trainer_step_seconds_bucket{instance=~"$instance"}[5m])))`, "{{instance}} p99")}},
				{Title: "Tokens and steps", About: "Tokens a second; steps a minute, and those without a finite loss.", Kind: Graph, Unit: "short", Width: 8, Asks: []Ask{p(`sum by (instance) (rate(lorayard_trainer_tokens_total{instance=~"$instance"}[5m]))`, "{{instance}} tokens/s"), p(`sum by (instance) (rate(lorayard_trainer_steps_total{instance=~"$instance"}[5m])) * 60`, "{{instance}} steps/min"), p(`sum by (instance) (rate(lorayard_trainer_skipped_steps_total{instance=~"$instance"}[5m])) * 60 > 0`, "{{instance}} skipped/min")}},
				{Title: "Stages", About: "Mean time that attempts spent in a stage.", Kind: Graph, Unit: "s", Width: 8, Asks: []Ask{p(`sum by (stage) (rate(lorayard_agent_stage_seconds_sum{instance=~"$instance"}[15m])) / sum by (stage) (rate(lorayard_agent_stage_seconds_count{instance=~"$instance"}[15m]))`, "{{stage}}")}},
				{Title: "Attempts that ended here", About: "An hour, by outcome and kind.", Kind: Graph, Unit: "short", Width: 8, Stacked: true, Asks: []Ask{p(`sum by (outcome, kind) (rate(lorayard_agent_attempts_total{instance=~"$instance"}[15m])) * 3600 > 0`, "{{outcome}} {{kind}}")}},
				{Title: "Time of the devices", About: "Share of the time in each state.", Kind: Graph, Unit: "percentunit", Width: 8, Stacked: true, Asks: []Ask{p(`sum by (state) (rate(lorayard_gpu_state_seconds_total`+at+`[5m])) / scalar(sum(rate(lorayard_gpu_state_seconds_total`+at+`[5m])))`, "{{state}}")}},
				{Title: "Attempts and devices", About: "Under way, and devices by the agent's own books.", Kind: Graph, Unit: "short", Width: 8, Asks: []Ask{p(`sum(lorayard_agent_running_attempts{instance=~"$instance"})`, "attempts"), p(`sum by (state) (lorayard_agent_devices{instance=~"$instance"})`, "devices {{state}}")}},
			}},
			{"To the rest of the system", []Panel{
				{Title: "Lease renewals", About: "Time of one, and failures a minute.", Kind: Graph, Unit: "s", Width: 6, Asks: []Ask{p(`histogram_quantile(0.99, sum by (le, instance) (rate(lorayard_agent_renewal_seconds_bucket{instance=~"$instance"}[5m])))`, "{{instance}} p99"), p(`sum by (instance) (rate(lorayard_agent_renewals_total{result="error", instance=~"$instance"}[5m])) * 60 > 0`, "{{instance}} failures")}},
				{Title: "Age of the last renewal", About: "The lease lasts five seconds.", Kind: Graph, Unit: "s", Width: 6, Asks: []Ask{p(`time() - lorayard_agent_last_renewal_timestamp_seconds{instance=~"$instance"}`, "{{instance}}")}},
				{Title: "Spool", About: "Age of the oldest sample or line that is not in Postgres yet.", Kind: Graph, Unit: "s", Width: 6, Asks: []Ask{p(`lorayard_agent_spool_oldest_age_seconds{instance=~"$instance"}`, "{{instance}}")}},
				{Title: "Spooled", About: "Samples and lines, and their bytes on the disk.", Kind: Graph, Unit: "short", Width: 6, Asks: []Ask{p(`lorayard_agent_spool_records{instance=~"$instance"}`, "{{instance}} records"), p(`lorayard_agent_spool_bytes{instance=~"$instance"}`, "{{instance}} bytes")}},
				{Title: "Writing samples and lines", About: "Time of one batch, and failures a minute.", Kind: Graph, Unit: "s", Width: 6, Asks: []Ask{p(`histogram_quantile(0.99, sum by (le, instance) (rate(lorayard_agent_sink_seconds_bucket{instance=~"$instance"}[5m])))`, "{{instance}} p99"), p(`sum by (instance) (rate(lorayard_agent_sink_errors_total{instance=~"$instance"}[5m])) * 60 > 0`, "{{instance}} failures"), p(`sum by (instance) (rate(lorayard_agent_dropped_records_total{instance=~"$instance"}[5m])) * 60 > 0`, "{{instance}} dropped")}},
				{Title: "Storage", About: "Bytes a second, both ways.", Kind: Graph, Unit: "Bps", Width: 6, Asks: []Ask{p(`sum by (direction) (rate(lorayard_storage_transferred_bytes_total{instance=~"$instance"}[5m]))`, "{{direction}}")}},
				{Title: "Transfers", About: "Time of one file; retries and files given up, a minute.", Kind: Graph, Unit: "s", Width: 6, Asks: []Ask{p(`histogram_quantile(0.9, sum by (le, op) (rate(lorayard_storage_transfer_seconds_bucket{instance=~"$instance"}[15m])))`, "{{op}} p90"), p(`sum by (op) (rate(lorayard_storage_retries_total{instance=~"$instance"}[5m])) * 60 > 0`, "{{op}} retries"), p(`sum by (op) (rate(lorayard_storage_errors_total{instance=~"$instance"}[5m])) * 60 > 0`, "{{op}} given up")}},
				{Title: "Checkpoints", About: "An hour, by what came of them.", Kind: Graph, Unit: "short", Width: 6, Asks: []Ask{p(`sum by (result) (rate(lorayard_agent_checkpoints_total{instance=~"$instance"}[15m])) * 3600`, "{{result}}")}},
				{Title: "Presence streams and gate", About: "Dispatchers that have the agent's stream; 1 while tasks come by wake-up.", Kind: Graph, Unit: "short", Width: 8, Asks: []Ask{p(`lorayard_agent_presence_streams{instance=~"$instance"}`, "{{instance}} streams"), p(`lorayard_agent_queue_gate_active{instance=~"$instance"}`, "{{instance}} gate")}},
				{Title: "Clock", About: "The database's minus the host's.", Kind: Graph, Unit: "s", Width: 8, Asks: []Ask{p(`lorayard_agent_clock_skew_seconds{instance=~"$instance"}`, "{{instance}}")}},
				{Title: "The agent's own memory", About: "Resident bytes of the process.", Kind: Graph, Unit: "bytes", Width: 8, Asks: []Ask{p(`process_resident_memory_bytes{instance=~"$instance"}`, "{{instance}}")}},
			}},
		},
	}
}
