{{/* Probes of a pool's container. `startup`: until its processes have loaded; `readiness`: a router's pod answers requests with every
expert placed, an expert's pod serves its shard; `liveness`: Ray's node is well. Call with (dict "root" $ "pool" POOL). */}}
{{- define "expertmesh.probes" -}}
{{- $p := .root.Values.probes -}}
{{- $own := .pool.probes | default dict -}}
{{- $alive := dict "httpGet" (dict "path" "/api/healthz" "port" 52365) -}}
{{- $loaded := dict "httpGet" (dict "path" "/ready" "port" 9400) -}}
{{- $serves := dict "httpGet" (dict "path" "/ready" "port" 8000) -}}
{{- $times := dict "periodSeconds" (int $p.periodSeconds) "timeoutSeconds" (int $p.timeoutSeconds) -}}
{{- $startup := $loaded -}}
{{- $readiness := $loaded -}}
{{- if eq .pool.role "head" -}}
{{- $startup = $alive -}}
{{- $readiness = $alive -}}
{{- else if eq .pool.role "router" -}}
{{- $readiness = $serves -}}
{{- else if include "expertmesh.incremental" .root -}}
{{- /* The Services that KubeRay makes for this strategy choose by readiness alone. */ -}}
{{- $readiness = $serves -}}
{{- end -}}
{{- $tries := div (add (int $p.startupSeconds) (int $p.periodSeconds) -1) (int $p.periodSeconds) -}}
startupProbe:
  {{- include "expertmesh.probe" (list $own.startup (dict "failureThreshold" (int $tries)) $times $startup) | nindent 2 }}
readinessProbe:
  {{- include "expertmesh.probe" (list $own.readiness (dict "failureThreshold" (int $p.readinessFailures)) $times $readiness) | nindent 2 }}
livenessProbe:
  {{- include "expertmesh.probe" (list $own.liveness (dict "failureThreshold" (int $p.livenessFailures)) $times $alive) | nindent 2 }}
{{- end -}}

{{/* A probe that says what to ask stands for itself; one that does not changes the times of the chart's own. Call with a list: the
one of the values, then the chart's own in parts. */}}
{{- define "expertmesh.probe" -}}
{{- $own := first . | default dict -}}
{{- if or $own.httpGet $own.exec $own.tcpSocket $own.grpc -}}
{{- toYaml $own -}}
{{- else -}}
{{- $made := dict -}}
{{- range rest . -}}
{{- $made = mustMergeOverwrite $made . -}}
{{- end -}}
{{- mustMergeOverwrite $made $own | toYaml -}}
{{- end -}}
{{- end -}}
