{{/* Probes of a pool's container. `startup`: until its processes have loaded; `readiness`: a router's pod answers requests with every
expert placed, an expert's pod serves its shard; `liveness`: Ray's node is well. Call with (dict "root" $ "pool" POOL). */}}
{{- define "expertmesh.probes" -}}
{{- $p := .root.Values.probes -}}
{{- $own := .pool.probes -}}
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
{{- else if eq .root.Values.upgrade.strategy "NewClusterWithIncrementalUpgrade" -}}
{{- /* The Services that KubeRay makes for this strategy choose by readiness alone. */ -}}
{{- $readiness = $serves -}}
{{- end -}}
{{- $tries := div (add (int $p.startupSeconds) (int $p.periodSeconds) -1) (int $p.periodSeconds) -}}
startupProbe:
  {{- $own.startup | default (mustMerge (dict "failureThreshold" (int $tries)) $times $startup) | toYaml | nindent 2 }}
readinessProbe:
  {{- $own.readiness | default (mustMerge (dict "failureThreshold" (int $p.readinessFailures)) $times $readiness) | toYaml | nindent 2 }}
livenessProbe:
  {{- $own.liveness | default (mustMerge (dict "failureThreshold" (int $p.livenessFailures)) $times $alive) | toYaml | nindent 2 }}
{{- end -}}
