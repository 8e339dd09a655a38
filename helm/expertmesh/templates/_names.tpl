{{/* Names and labels. KubeRay takes at most 47 characters for a RayService and adds up to 16 to those of pods. */}}
{{- define "expertmesh.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "expertmesh.fullname" -}}
{{- $name := include "expertmesh.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains $name .Release.Name -}}
{{- include "expertmesh.short" .Release.Name -}}
{{- else -}}
{{- include "expertmesh.short" (printf "%s-%s" .Release.Name $name) -}}
{{- end -}}
{{- end -}}

{{/* At most 40 characters of a name. Two that begin alike stay two. */}}
{{- define "expertmesh.short" -}}
{{- if gt (len .) 40 -}}
{{- printf "%s-%s" (trunc 31 . | trimSuffix "-") (sha256sum . | trunc 8) -}}
{{- else -}}
{{- . -}}
{{- end -}}
{{- end -}}

{{/* The name of a Job, another one for every other spec: that of a Job cannot be changed. Call with (dict "root" $ "kind" KIND "spec" TEXT). */}}
{{- define "expertmesh.jobName" -}}
{{- printf "%s-%s-%s" (include "expertmesh.fullname" .root) .kind (sha256sum .spec | trunc 8) -}}
{{- end -}}

{{/* What finds the pods: never changes, since a change of a pod's labels would replace the cluster. */}}
{{- define "expertmesh.selector" -}}
app.kubernetes.io/part-of: expertmesh
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "expertmesh.labels" -}}
{{- $labels := dict "app.kubernetes.io/name" (include "expertmesh.name" .) "app.kubernetes.io/version" .Chart.AppVersion "app.kubernetes.io/managed-by" .Release.Service "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version) -}}
{{- mustMergeOverwrite $labels (.Values.commonLabels | default dict) (include "expertmesh.selector" . | fromYaml) | toYaml -}}
{{- end -}}

{{/* Lists one after the other; a value that was set to null is an empty one. */}}
{{- define "expertmesh.joined" -}}
{{- $all := list -}}
{{- range . -}}
{{- $all = concat $all (. | default list) -}}
{{- end -}}
{{- toYaml $all -}}
{{- end -}}

{{/* Lists of variables one after the other; of those with one name the last counts, as an API server refuses the others. */}}
{{- define "expertmesh.variables" -}}
{{- $names := dict -}}
{{- $kept := list -}}
{{- range include "expertmesh.joined" . | fromYamlArray | reverse -}}
{{- if not (hasKey $names .name) -}}
{{- $kept = prepend $kept . -}}
{{- $_ := set $names .name true -}}
{{- end -}}
{{- end -}}
{{- toYaml $kept -}}
{{- end -}}

{{/* Call with (dict "root" $ "name" NAME [and "annotations", "labels"]). */}}
{{- define "expertmesh.metadata" -}}
name: {{ .name | quote }}
namespace: {{ .root.Release.Namespace | quote }}
labels:
  {{- mustMergeOverwrite (include "expertmesh.labels" .root | fromYaml) (.labels | default dict) | toYaml | nindent 2 }}
{{- with mustMergeOverwrite (dict) (.root.Values.commonAnnotations | default dict) (.annotations | default dict) }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "expertmesh.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}
{{ .repository }}@{{ .digest }}
{{- else -}}
{{ .repository }}:{{ default (printf "%s-%s" $.Chart.AppVersion (.variant | default ($.Values.gpu.enabled | ternary "cuda" "cpu"))) .tag }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "expertmesh.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{ default (include "expertmesh.fullname" .) .Values.serviceAccount.name }}
{{- else -}}
{{ default "default" .Values.serviceAccount.name }}
{{- end -}}
{{- end -}}

{{- define "expertmesh.keysSecret" -}}
{{ default (printf "%s-keys" (include "expertmesh.fullname" .)) .Values.apiKeys.existingSecret }}
{{- end -}}

{{- define "expertmesh.adminSecret" -}}
{{ default (printf "%s-keys" (include "expertmesh.fullname" .)) .Values.admin.existingSecret }}
{{- end -}}

{{- define "expertmesh.tlsSecret" -}}
{{ default (printf "%s-tls" (include "expertmesh.fullname" .)) .Values.tls.existingSecret }}
{{- end -}}

{{/* By which series and traces tell releases apart. */}}
{{- define "expertmesh.clusterName" -}}
{{ .Release.Namespace }}/{{ include "expertmesh.fullname" . }}
{{- end -}}

{{/* Not empty where KubeRay moves the traffic in steps, over Services and a Gateway that it makes itself. */}}
{{- define "expertmesh.incremental" -}}
{{- if eq .Values.upgrade.strategy "NewClusterWithIncrementalUpgrade" -}}true{{- end -}}
{{- end -}}

{{/* What clients may reach through an Ingress or a route: neither metrics nor the live page. */}}
{{- define "expertmesh.paths" -}}
{{- toYaml (list "/v1" "/tokenize" "/detokenize" "/invocations" "/ping" "/health" "/ready" "/version") -}}
{{- end -}}
