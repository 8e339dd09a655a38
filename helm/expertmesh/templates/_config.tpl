{{/* The configuration of the cluster: what `expertmesh serve` takes, as arguments of the Serve application. */}}

{{/* How many processes there are; these change in place. */}}
{{- define "expertmesh.counts" -}}
{{- $routers := mul .Values.routers.replicas .Values.routers.routersPerPod -}}
{{- $workers := mul .Values.routers.replicas .Values.routers.expertWorkersPerPod -}}
{{- range $pool := include "expertmesh.expertPools" . | fromYamlArray -}}
{{- $workers = add $workers (mul $pool.replicas $pool.expertWorkersPerPod) -}}
{{- end -}}
routers: {{ $routers }}
expert_workers: {{ $workers }}
gateways: {{ .Values.routers.replicas }}
{{- if .Values.autoscaling.enabled }}
{{ include "expertmesh.bounds" . }}
{{- end }}
{{- end -}}

{{/* Everything else; a change of it needs a new cluster. */}}
{{- define "expertmesh.settings" -}}
model: {{ include "expertmesh.model.directory" . | quote }}
served_model_name: {{ include "expertmesh.model.name" . | quote }}
host: 0.0.0.0
port: 8000
admin_host: 0.0.0.0
admin_port: 8100
admin_token_file: /etc/expertmesh/admin/admin-token
metrics_port: 9400
require_node_roles: true
cluster_name: {{ include "expertmesh.clusterName" . | quote }}
rebalance: auto
{{- if .Values.apiKeys.allowNone }}
allow_no_keys: true
{{- else }}
api_keys_file: /etc/expertmesh/keys/api-keys
{{- end }}
{{- if eq .Values.tls.mode "none" }}
trusted_network: true
{{- else }}
tls_cert: /etc/expertmesh/tls/tls.crt
tls_key: /etc/expertmesh/tls/tls.key
tls_ca: /etc/expertmesh/tls/ca.crt
{{- end }}
{{- $device := .Values.gpu.enabled | ternary "cuda" "cpu" }}
router_device: {{ $device }}
expert_device: {{ $device }}
{{- if .Values.gpu.enabled }}
gpus_per_router: 1
gpus_per_expert_worker: 1
{{- end }}
{{- if .Values.autoscaling.enabled }}
autoscale: auto
{{- end }}
{{- end -}}

{{- define "expertmesh.serveConfig" -}}
{{- $settings := mustMergeOverwrite (include "expertmesh.settings" . | fromYaml) (deepCopy (.Values.config | default dict)) -}}
{{- $args := mustMergeOverwrite $settings (include "expertmesh.counts" . | fromYaml) -}}
proxy_location: EveryNode
http_options:
  host: 0.0.0.0
  port: 8000
  request_timeout_s: 86400
applications:
  - name: expertmesh
    route_prefix: /
    import_path: cluster.serve_app:app
    external_scaler_enabled: true
    args:
      {{- toYaml $args | nindent 6 }}
    deployments:
      - name: gateway
        max_replicas_per_node: 1
        ray_actor_options:
          num_cpus: 0
          resources: {expertmesh_gateway: 1}
{{- end -}}

{{/* In an annotation of the head: what needs a new cluster changes it, numbers of processes do not. */}}
{{- define "expertmesh.configChecksum" -}}
{{- $settings := mustMergeOverwrite (include "expertmesh.settings" . | fromYaml) (deepCopy (.Values.config | default dict)) -}}
{{- $settings | toJson | sha256sum | trunc 16 -}}
{{- end -}}

{{/* How far the controller may scale the pools. */}}
{{- define "expertmesh.bounds" -}}
{{- $routers := .Values.routers -}}
{{- $least := mul $routers.minReplicas $routers.expertWorkersPerPod -}}
{{- $most := mul $routers.maxReplicas $routers.expertWorkersPerPod -}}
{{- range $pool := include "expertmesh.expertPools" . | fromYamlArray -}}
{{- $least = add $least (mul $pool.minReplicas $pool.expertWorkersPerPod) -}}
{{- $most = add $most (mul $pool.maxReplicas $pool.expertWorkersPerPod) -}}
{{- end -}}
min_routers: {{ mul $routers.minReplicas $routers.routersPerPod }}
max_routers: {{ mul $routers.maxReplicas $routers.routersPerPod }}
min_expert_workers: {{ max 1 $least }}
max_expert_workers: {{ $most }}
{{- end -}}
