// Generated from the schema, as `supabase gen types` does: python -m tests.support.database_types
export type Json =
  | string
  | number
  | boolean
  | null
  | { [key: string]: Json | undefined }
  | Json[]

export type Database = {
  // Allows to automatically instantiate createClient with right options
  // instead of createClient<Database, { PostgrestVersion: 'XX' }>(URL, KEY)
  __InternalSupabase: {
    PostgrestVersion: "14.5"
  }
  public: {
    Tables: {
      run_events: {
        Row: {
          id: string
          kind: string
          payload: Json | null
          run_id: string | null
          run_kind: string | null
          seq: number | null
          ts: string | null
          workflow_id: string | null
        }
        Insert: {
          id?: string
          kind: string
          payload?: Json | null
          run_id?: string | null
          run_kind?: string | null
          seq?: number | null
          ts?: string | null
          workflow_id?: string | null
        }
        Update: {
          id?: string
          kind?: string
          payload?: Json | null
          run_id?: string | null
          run_kind?: string | null
          seq?: number | null
          ts?: string | null
          workflow_id?: string | null
        }
        Relationships: [
          {
            foreignKeyName: "run_events_run_id_fkey"
            columns: ["run_id"]
            referencedRelation: "image_jobs"
            referencedColumns: ["jobId"]
          },
          {
            foreignKeyName: "run_events_run_id_fkey"
            columns: ["run_id"]
            referencedRelation: "runs"
            referencedColumns: ["id"]
          },
        ]
      }
      runs: {
        Row: {
          attempt: number | null
          call: number | null
          claim: number | null
          claimed_by: string | null
          created_at: string | null
          created_by: string | null
          due_at: string | null
          finished_at: string | null
          id: string
          kind: string
          lane: string | null
          max_attempts: number | null
          message: string | null
          metadata: Json | null
          payload: Json | null
          preview_url: string | null
          priority: number | null
          processor: string | null
          progress: number | null
          provider_job_id: string | null
          queue_state: string | null
          queued_at: string | null
          rank: number | null
          refused_since: string | null
          requeued_by: string | null
          routed_to: string | null
          source_workflow: string | null
          started_at: string | null
          status: string
          subject_id: string
          submitted_at: string | null
          ticket: number | null
          unheld: boolean | null
          updated_at: string | null
          webhook: string | null
          workflow_rank: number | null
        }
        Insert: {
          attempt?: number | null
          call?: number | null
          claim?: number | null
          claimed_by?: string | null
          created_at?: string | null
          created_by?: string | null
          due_at?: string | null
          finished_at?: string | null
          id?: string
          kind: string
          lane?: string | null
          max_attempts?: number | null
          message?: string | null
          metadata?: Json | null
          payload?: Json | null
          preview_url?: string | null
          priority?: number | null
          processor?: string | null
          progress?: number | null
          provider_job_id?: string | null
          queue_state?: string | null
          queued_at?: string | null
          rank?: number | null
          refused_since?: string | null
          requeued_by?: string | null
          routed_to?: string | null
          source_workflow?: string | null
          started_at?: string | null
          status: string
          subject_id: string
          submitted_at?: string | null
          ticket?: number | null
          unheld?: boolean | null
          updated_at?: string | null
          webhook?: string | null
          workflow_rank?: number | null
        }
        Update: {
          attempt?: number | null
          call?: number | null
          claim?: number | null
          claimed_by?: string | null
          created_at?: string | null
          created_by?: string | null
          due_at?: string | null
          finished_at?: string | null
          id?: string
          kind?: string
          lane?: string | null
          max_attempts?: number | null
          message?: string | null
          metadata?: Json | null
          payload?: Json | null
          preview_url?: string | null
          priority?: number | null
          processor?: string | null
          progress?: number | null
          provider_job_id?: string | null
          queue_state?: string | null
          queued_at?: string | null
          rank?: number | null
          refused_since?: string | null
          requeued_by?: string | null
          routed_to?: string | null
          source_workflow?: string | null
          started_at?: string | null
          status?: string
          subject_id?: string
          submitted_at?: string | null
          ticket?: number | null
          unheld?: boolean | null
          updated_at?: string | null
          webhook?: string | null
          workflow_rank?: number | null
        }
        Relationships: []
      }
      workflow_members: {
        Row: {
          created_at: string
          user_id: string
          workflow_id: string
        }
        Insert: {
          created_at?: string
          user_id: string
          workflow_id: string
        }
        Update: {
          created_at?: string
          user_id?: string
          workflow_id?: string
        }
        Relationships: []
      }
      workflow_nodes: {
        Row: {
          created_at: string | null
          id: string
          node_data: NonNullable<Json>
          node_type: string
          pinned_run: string | null
          position: Json | null
          run_ticket: number | null
          updated_at: string | null
          version: number | null
          workflow_id: string
        }
        Insert: {
          created_at?: string | null
          id: string
          node_data: NonNullable<Json>
          node_type: string
          pinned_run?: string | null
          position?: Json | null
          run_ticket?: number | null
          updated_at?: string | null
          version?: number | null
          workflow_id: string
        }
        Update: {
          created_at?: string | null
          id?: string
          node_data?: NonNullable<Json>
          node_type?: string
          pinned_run?: string | null
          position?: Json | null
          run_ticket?: number | null
          updated_at?: string | null
          version?: number | null
          workflow_id?: string
        }
        Relationships: []
      }
    }
    Views: {
      image_jobs: {
        Row: {
          error: string | null
          finishedAt: string | null
          imageUrl: string | null
          jobId: string | null
          metadata: Json | null
          model: string | null
          nodeId: string | null
          provider: string | null
          startedAt: string | null
          status: string | null
          workflowId: string | null
        }
        Insert: {
          error?: never
          finishedAt?: string | null
          imageUrl?: never
          jobId?: string | null
          metadata?: Json | null
          model?: never
          nodeId?: never
          provider?: never
          startedAt?: string | null
          status?: string | null
          workflowId?: string | null
        }
        Update: {
          error?: never
          finishedAt?: string | null
          imageUrl?: never
          jobId?: string | null
          metadata?: Json | null
          model?: never
          nodeId?: never
          provider?: never
          startedAt?: string | null
          status?: string | null
          workflowId?: string | null
        }
        Relationships: []
      }
      image_models: {
        Row: {
          as_of: string | null
          model: string | null
          negative_prompt: boolean | null
          previews: boolean | null
          previous_image: boolean | null
          price: number | null
          provider: string | null
          qualities: string[] | null
          ratios: string[] | null
          retired: string | null
          seed: boolean | null
          sizes: string[] | null
          source: string | null
          successor: string | null
          typical_seconds: number | null
        }
        Insert: {
          as_of?: string | null
          model?: string | null
          negative_prompt?: boolean | null
          previews?: boolean | null
          previous_image?: boolean | null
          price?: number | null
          provider?: string | null
          qualities?: string[] | null
          ratios?: string[] | null
          retired?: string | null
          seed?: boolean | null
          sizes?: string[] | null
          source?: string | null
          successor?: string | null
          typical_seconds?: number | null
        }
        Update: {
          as_of?: string | null
          model?: string | null
          negative_prompt?: boolean | null
          previews?: boolean | null
          previous_image?: boolean | null
          price?: number | null
          provider?: string | null
          qualities?: string[] | null
          ratios?: string[] | null
          retired?: string | null
          seed?: boolean | null
          sizes?: string[] | null
          source?: string | null
          successor?: string | null
          typical_seconds?: number | null
        }
        Relationships: []
      }
      image_provider_status: {
        Row: {
          check_in: number | null
          model: string | null
          provider: string | null
          sentence: string | null
          since: string | null
          state: string | null
          until: string | null
        }
        Relationships: []
      }
      image_usage: {
        Row: {
          max_images: number | null
          max_usd: number | null
          max_waiting: number | null
          period: string | null
          resets_at: string | null
          scope: string | null
          used_images: number | null
          used_usd: number | null
          waiting: number | null
          workflow_id: string | null
        }
        Relationships: []
      }
    }
    Functions: {
      can_open_workflow: { Args: { workflow_id: string }; Returns: boolean }
      cancel_run: { Args: { run_id: string }; Returns: Json }
      estimate_cost: {
        Args: { processor: string; prompt_spec: Json }
        Returns: number
      }
      join_workflow: { Args: { token: string }; Returns: string }
      leave_workflow: { Args: { workflow_id: string }; Returns: undefined }
      receive_webhook: {
        Args: { body: string; headers: Json; provider: string }
        Returns: Json
      }
      requeue_run: { Args: { run_id: string }; Returns: Json }
      share_workflow: { Args: { workflow_id: string }; Returns: string }
      show_run: { Args: { run_id: string }; Returns: Json }
      start_image_job: { Args: { request: Json }; Returns: Json }
      unshare_workflow: { Args: { workflow_id: string }; Returns: undefined }
      webhook_hmac: { Args: { "": Json }; Returns: Json }
      webhook_midjourney: { Args: { "": Json }; Returns: Json }
      webhook_openai: { Args: { "": Json }; Returns: Json }
    }
    Enums: {
      [_ in never]: never
    }
    CompositeTypes: {
      [_ in never]: never
    }
  }
}

type DatabaseWithoutInternals = Omit<Database, "__InternalSupabase">

type DefaultSchema = DatabaseWithoutInternals[Extract<keyof Database, "public">]

export type Tables<
  DefaultSchemaTableNameOrOptions extends
    | keyof (DefaultSchema["Tables"] & DefaultSchema["Views"])
    | { schema: keyof DatabaseWithoutInternals },
  TableName extends (DefaultSchemaTableNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof (DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"] &
        DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Views"])
    : never) = never,
> = DefaultSchemaTableNameOrOptions extends {
  schema: keyof DatabaseWithoutInternals
}
  ? (DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"] &
      DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Views"])[TableName] extends {
      Row: infer R
    }
    ? R
    : never
  : DefaultSchemaTableNameOrOptions extends keyof (DefaultSchema["Tables"] &
        DefaultSchema["Views"])
    ? (DefaultSchema["Tables"] &
        DefaultSchema["Views"])[DefaultSchemaTableNameOrOptions] extends {
        Row: infer R
      }
      ? R
      : never
    : never

export type TablesInsert<
  DefaultSchemaTableNameOrOptions extends
    | keyof DefaultSchema["Tables"]
    | { schema: keyof DatabaseWithoutInternals },
  TableName extends (DefaultSchemaTableNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"]
    : never) = never,
> = DefaultSchemaTableNameOrOptions extends {
  schema: keyof DatabaseWithoutInternals
}
  ? DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"][TableName] extends {
      Insert: infer I
    }
    ? I
    : never
  : DefaultSchemaTableNameOrOptions extends keyof DefaultSchema["Tables"]
    ? DefaultSchema["Tables"][DefaultSchemaTableNameOrOptions] extends {
        Insert: infer I
      }
      ? I
      : never
    : never

export type TablesUpdate<
  DefaultSchemaTableNameOrOptions extends
    | keyof DefaultSchema["Tables"]
    | { schema: keyof DatabaseWithoutInternals },
  TableName extends (DefaultSchemaTableNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"]
    : never) = never,
> = DefaultSchemaTableNameOrOptions extends {
  schema: keyof DatabaseWithoutInternals
}
  ? DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"][TableName] extends {
      Update: infer U
    }
    ? U
    : never
  : DefaultSchemaTableNameOrOptions extends keyof DefaultSchema["Tables"]
    ? DefaultSchema["Tables"][DefaultSchemaTableNameOrOptions] extends {
        Update: infer U
      }
      ? U
      : never
    : never

export type Enums<
  DefaultSchemaEnumNameOrOptions extends
    | keyof DefaultSchema["Enums"]
    | { schema: keyof DatabaseWithoutInternals },
  EnumName extends (DefaultSchemaEnumNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof DatabaseWithoutInternals[DefaultSchemaEnumNameOrOptions["schema"]]["Enums"]
    : never) = never,
> = DefaultSchemaEnumNameOrOptions extends {
  schema: keyof DatabaseWithoutInternals
}
  ? DatabaseWithoutInternals[DefaultSchemaEnumNameOrOptions["schema"]]["Enums"][EnumName]
  : DefaultSchemaEnumNameOrOptions extends keyof DefaultSchema["Enums"]
    ? DefaultSchema["Enums"][DefaultSchemaEnumNameOrOptions]
    : never

export type CompositeTypes<
  PublicCompositeTypeNameOrOptions extends
    | keyof DefaultSchema["CompositeTypes"]
    | { schema: keyof DatabaseWithoutInternals },
  CompositeTypeName extends (PublicCompositeTypeNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof DatabaseWithoutInternals[PublicCompositeTypeNameOrOptions["schema"]]["CompositeTypes"]
    : never) = never,
> = PublicCompositeTypeNameOrOptions extends {
  schema: keyof DatabaseWithoutInternals
}
  ? DatabaseWithoutInternals[PublicCompositeTypeNameOrOptions["schema"]]["CompositeTypes"][CompositeTypeName]
  : PublicCompositeTypeNameOrOptions extends keyof DefaultSchema["CompositeTypes"]
    ? DefaultSchema["CompositeTypes"][PublicCompositeTypeNameOrOptions]
    : never

export const Constants = {
  public: {
    Enums: {},
  },
} as const
