{{/* Names and labels. KubeRay takes at most 47 characters for a RayService and adds up to 16 to those of pods. */}}
{{- define "expertmesh.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "expertmesh.fullname" -}}
{{- $name := include "expertmesh.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
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

{{/* Call with (dict "root" $ "name" NAME [and "annotations", "labels"]). */}}
{{- define "expertmesh.metadata" -}}
name: {{ .name }}
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
